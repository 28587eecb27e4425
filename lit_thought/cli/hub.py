"""``lit-thought push``."""

from __future__ import annotations

from lit_thought.cli.output import Result, say

__all__ = ["push"]


def push(
    adapter: str,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | None = None,
    evaluation: str | None = None,
) -> Result:
    """Share an adapter on the Hugging Face hub, with its card; the token is that of hf auth login, or $HF_TOKEN.

    Example: lit-thought push antonym/ me/antonym --private

    Args:
        adapter: adapter folder that fit wrote; its card quotes the instruction, unless fit had
            --store_instruction=false.
        repo_id: the repository, OWNER/NAME; made if there is none.
        private: make the repository private; the owner's default when left out.
        revision: branch to commit to, made if there is none.
        create_pr: make a pull request instead of committing to the main branch.
        message: first line of the commit.
        license: for the card, such as mit; the base model's, by its own card on the hub, when left out.
        language: code or codes for the card, such as en.
        base_model: hub id of the base model, where it was loaded from a folder.
        evaluation: folder that evaluate --out wrote; ADAPTER/evaluation, if it is there, when left out.
    """
    from lit_thought.patch.hub import push_adapter

    said = {} if message is None else {"commit_message": message}
    commit = push_adapter(
        adapter,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        license=license,
        language=language,
        base_model=base_model,
        evaluation=evaluation,
        **said,
    )
    say(f"Pushed {adapter} to {commit.pr_url or commit.commit_url}")
    return Result({"repo_id": repo_id, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url})
