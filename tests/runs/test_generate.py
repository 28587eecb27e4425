"""Batched generation from a shared lead, against one prompt at a time with no cache and no batch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fits import Untouched
from models import FAMILIES, make_model, make_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lit_thought.errors import ThoughtError
from lit_thought.model.calls import cache_arguments
from lit_thought.runs.generate import Generation, _Sampler, generate
from lit_thought.runs.room import with_room
from lit_thought.runs.streams import lead_cache

LEAD = [5, 17, 300, 8, 9, 44, 60, 61, 62, 63, 64, 65]  # longer than mistral's window of 8
REST = [[11, 12, 13], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53], [200], [31, 32, 33, 34], [11, 12]]
PROMPTS = [LEAD + rest for rest in REST]
TOKENIZER = make_tokenizer()


def talkative(family: str, seed: int = 0) -> PreTrainedModel:
    """A model that never ends by itself."""
    model = make_model(family, seed=seed)
    model.generation_config.eos_token_id = None
    return model


def one_by_one(model: PreTrainedModel, prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """Greedy continuation by full forwards, without cache, padding or ``generate``."""
    written = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(n):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        written.append(ids[len(prompt) :])
    return written


class SpellOut:
    """Decodes each token as its number, so that texts tell all tokens."""

    pad_token_id, eos_token_id = 1, None

    def decode(self, ids: Sequence[int], **kwargs) -> str:
        return "".join(f"{i} " for i in ids)

    def batch_decode(self, rows, **kwargs) -> list[str]:
        return [self.decode(row.tolist()) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_a_shared_lead_equal_one_by_one(family: str, batch_size: int) -> None:
    model = talkative(family)
    expected = one_by_one(model, PROMPTS, 12)
    found = generate(model, SpellOut(), PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert [g.text for g in found] == [" ".join(map(str, ids)) for ids in expected]
    assert not any(g.finished for g in found)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_prompts_with_nothing_in_common_and_a_single_prompt(family: str) -> None:
    model = talkative(family)
    expected = one_by_one(model, REST, 8)
    assert [g.text for g in generate(model, SpellOut(), REST, max_new_tokens=8)] == [
        " ".join(map(str, ids)) for ids in expected
    ]
    alone = generate(model, SpellOut(), [REST[1]], max_new_tokens=8)
    assert alone[0].text == " ".join(map(str, expected[1]))
    twice = generate(model, SpellOut(), [REST[1], REST[1]], max_new_tokens=8)
    assert twice == [alone[0], alone[0]]


def test_a_prompt_that_is_the_beginning_of_another() -> None:
    model = talkative("llama")
    prompts = [LEAD, [*LEAD, 7], LEAD[:3]]
    expected = one_by_one(model, prompts, 6)
    found = generate(model, SpellOut(), prompts, max_new_tokens=6)
    assert [g.text for g in found] == [" ".join(map(str, ids)) for ids in expected]


def test_the_lead_runs_once() -> None:
    model = talkative("llama")
    lengths: list[tuple[int, ...]] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda m, args, out: lengths.append(tuple(args[0].shape)))
    generate(model, SpellOut(), PROMPTS, max_new_tokens=1, batch_size=1)
    handle.remove()
    assert lengths == [(1, 12), (3, 3), (2, 14)]  # the lead; then what each batch adds, shortest first


def test_more_are_written_at_once_than_batch_size_while_they_are_small(monkeypatch) -> None:
    model = talkative("llama")
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    token = numbers * model.dtype.itemsize  # in the cache

    def rows(count: int, longest: int = 1, batch_size: int = 8) -> list[int]:
        found: list[int] = []
        prompts = [LEAD + [20 + i] * longest for i in range(count)]
        with pytest.MonkeyPatch.context() as patch:
            write = model.generate
            patch.setattr(model, "generate", lambda **given: found.append(len(given["input_ids"])) or write(**given))
            generate(model, SpellOut(), prompts, max_new_tokens=3, batch_size=batch_size)
        return found

    assert rows(32) == [32]
    assert rows(33) == [17, 16]
    assert rows(33, batch_size=32) == [33]
    monkeypatch.setattr("lit_thought.runs.generate._CACHED", 20 * token * (len(LEAD) + 1 + 3))
    assert rows(40) == [20, 20]
    assert rows(40, longest=30) == [8] * 5  # their cache is too large for more than was asked for
    monkeypatch.undo()
    monkeypatch.setattr("lit_thought.runs.generate._READ", 60)
    assert rows(30, longest=5) == [10, 10, 10]
    assert rows(30) == [30]
    monkeypatch.setattr("lit_thought.runs.generate.common_prefix", lambda prompts: 0)
    assert rows(30) == [8, 8, 8, 6]


def test_an_end_token_finishes_a_row_and_not_the_others() -> None:
    model = talkative("llama")
    written = one_by_one(model, PROMPTS, 10)
    end = written[1][4]
    model.generation_config.eos_token_id = [end, 999]
    found = generate(model, SpellOut(), PROMPTS, max_new_tokens=10)
    for generation, ids in zip(found, written, strict=True):
        expected = ids[: ids.index(end)] if end in ids else ids
        assert generation.text == " ".join(map(str, expected))
        assert generation.finished == (end in ids)
    assert found[1].finished
    assert not all(g.finished for g in found)


def test_the_tokenizers_end_token_counts_too() -> None:
    model = talkative("llama")
    written = one_by_one(model, PROMPTS[:1], 5)[0]
    tokenizer = SpellOut()
    tokenizer.eos_token_id = written[2]  # type: ignore[assignment]
    found = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=5)  # type: ignore[arg-type]
    end = written.index(written[2])
    assert found == [Generation(" ".join(map(str, written[:end])), True, tuple(written[: end + 1]))]


def forced(model: PreTrainedModel, texts: Sequence[str]) -> dict:
    """Options that make a model write given texts, whatever it thinks; the row is known by its last prompt token."""

    class Force(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.full_like(scores, -1e9)
            for row, ids in enumerate(input_ids.tolist()):
                which = max(i for i, token in enumerate(ids) if token >= 500)
                new = ids[which + 1 :]
                rest = TOKENIZER(texts[ids[which] - 500])["input_ids"] + [TOKENIZER.eos_token_id]
                scores[row, rest[min(len(new), len(rest) - 1)]] = 0
            return scores

    return {"logits_processor": [Force()]}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_stop_string(batch_size: int) -> None:
    texts = [
        " cold\nQ: big\nA: small\n",  # stops after the answer
        "\n\n fox\nQ",  # blank text before the answer is no stop
        " dog",  # ends by its end token
        " up" * 40,  # does neither
        "\n" * 40,  # blank for ever
        " hot\n",  # ends at the stop string
    ]
    model = make_model("llama")
    prompts = [[5, 6, 7, 8, *range(20, 20 + i), 500 + i] for i in range(len(texts))]
    found = generate(
        model,
        TOKENIZER,
        prompts,
        stop="\n",
        max_new_tokens=12,
        batch_size=batch_size,
        options=forced(model, texts),
    )
    assert [g.text for g in found[:3]] == ["cold", "fox", "dog"]
    assert found[3].text.startswith("up up up")
    assert (found[4].text, found[5].text) == ("", "hot")
    assert [g.finished for g in found] == [True, True, True, False, False, True]
    written = [" cold\n", "\n\n fox\n", " dog</s>", " up" * 12, "\n" * 12, " hot\n"]  # " up" and "\n" are a token each
    assert [TOKENIZER.decode(g.tokens) for g in found] == written
    assert [len(g.tokens) for g in found[2:5]] == [len(TOKENIZER(" dog")["input_ids"]) + 1, 12, 12]


@pytest.mark.parametrize("keep_special", [False, True])
def test_a_stop_string_may_have_special_tokens(keep_special: bool) -> None:
    """As that of a chat's form written by hand has, where the end of a turn does not end the model's output."""
    texts = [" cold<|e|>\n<|s|>user\nbig<|e|>\n", " hot<|s|> tea<|e|>\n<|s|>", " fox<|e|> dog"]
    prompts = [[5, 6, 7, 8, *range(20, 20 + i), 500 + i] for i in range(len(texts))]
    options = forced(make_model("llama"), texts)
    found = generate(
        make_model("llama"),
        TOKENIZER,
        prompts,
        stop="<|e|>\n",
        max_new_tokens=16,
        options=options,
        keep_special=keep_special,
    )
    kept = ["cold", "hot<|s|> tea", "fox<|e|> dog"]
    assert [one.text for one in found] == (kept if keep_special else [re.sub(r"<\|.\|>", "", text) for text in kept])
    assert all(one.finished for one in found)
    assert [TOKENIZER.decode(one.tokens) for one in found] == [
        " cold<|e|>\n",
        " hot<|s|> tea<|e|>\n",
        " fox<|e|> dog</s>",
    ]


def test_other_tokens_end_an_output_too() -> None:
    """As a chat template's end of turn does for a base model; what the caller says of end tokens goes before."""
    model, texts = make_model("llama"), [" cold<|e|> big", " hot"]
    end, prompts = TOKENIZER.convert_tokens_to_ids("<|e|>"), [[5, 6, 500], [5, 6, 501]]
    given = {"ends": [end], "keep_special": True, "max_new_tokens": 12}
    found = generate(model, TOKENIZER, prompts, options=forced(model, texts), **given)
    assert [(one.text, one.finished) for one in found] == [("cold", True), ("hot", True)]
    own = {**forced(model, texts), "eos_token_id": TOKENIZER.eos_token_id}
    found = generate(model, TOKENIZER, prompts, options=own, **given)
    assert [one.text for one in found] == ["cold<|e|> big", "hot"]


def test_rows_stop_by_themselves() -> None:
    """Once every row has stopped, nothing more is run."""
    model, steps = make_model("llama"), []
    handle = model.register_forward_hook(lambda *args: steps.append(1))
    prompts = [[5, 6, 500], [5, 6, 501]]
    generate(model, TOKENIZER, prompts, stop="\n", max_new_tokens=50, options=forced(model, ["hot\n", " up\nQ: big"]))
    handle.remove()
    assert len(steps) < 6


def test_rows_that_have_come_to_an_end_leave_the_batch() -> None:
    """Every eighth token: of five prompts that end after 1, 9, 10, 20 and never."""
    model, sizes = talkative("llama"), []
    written = [one.tokens for one in generate(model, SpellOut(), PROMPTS, max_new_tokens=30)]
    ends = [tokens[i] for tokens, i in zip(written, (0, 8, 9, 19), strict=False)]
    lengths = [next((i + 1 for i, token in enumerate(tokens) if token in ends), 30) for tokens in written]
    assert len(set(lengths)) > 2
    handle = model.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(out.logits)), with_kwargs=True
    )
    found = generate(model, SpellOut(), PROMPTS, max_new_tokens=30, options={"eos_token_id": ends})
    handle.remove()
    assert [one.tokens for one in found] == [tokens[:n] for tokens, n in zip(written, lengths, strict=True)]
    steps = sizes[-max(lengths) :]
    assert steps == [sum(n > 8 * (i // 8) for n in lengths) for i in range(max(lengths))]


def test_a_batchs_cache_is_written_in_place() -> None:
    model = make_model("llama")
    cache = with_room(lead_cache(model, LEAD), 3, 4)
    alone = lead_cache(model, LEAD)
    alone.batch_repeat_interleave(3)
    tokens = torch.tensor([[11, 12], [13, 14], [15, 16]])
    places = [layer.keys.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        for ids in (tokens, tokens[:, :1]):
            assert torch.equal(
                model(ids, **cache_arguments(model, cache)).logits, model(ids, **cache_arguments(model, alone)).logits
            )
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        assert cache.get_seq_length() == len(LEAD) + 3
        for each in (cache, alone):
            each.batch_select_indices(torch.tensor([0, 2]))
        ids = tokens[:2, :1]
        assert torch.equal(
            model(ids, **cache_arguments(model, cache)).logits, model(ids, **cache_arguments(model, alone)).logits
        )


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


SAMPLED = {"do_sample": True, "temperature": 2.0}


def test_sampling_is_seeded_and_leaves_the_global_generators_alone() -> None:
    model = talkative("llama")

    def sample(seed: int) -> list[Generation]:
        return generate(model, SpellOut(), PROMPTS, max_new_tokens=6, seed=seed, options=SAMPLED)

    before = random_states()
    first = sample(0)
    assert random_states() == before
    torch.manual_seed(123)  # the global state does not matter either
    assert sample(0) == first
    assert sample(1) != first
    assert first != generate(model, SpellOut(), PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_what_is_sampled_does_not_depend_on_the_batch(batch_size: int) -> None:
    model, prompts = talkative("llama"), [*PROMPTS, PROMPTS[0]]
    found = generate(model, SpellOut(), prompts, max_new_tokens=8, batch_size=batch_size, options=SAMPLED)
    backwards = generate(model, SpellOut(), PROMPTS[::-1], max_new_tokens=8, batch_size=4, options=SAMPLED)
    assert found[:-1] == backwards[::-1]
    assert found[-1] != found[0]  # the same prompt once more


@pytest.mark.parametrize(
    "shaping",
    [
        {},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": None},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"typical_p": 0.5},
    ],
)
def test_samples_have_the_distribution_that_transformers_warpers_make(shaping: dict) -> None:
    """Of the next token, over 1,500 draws; which tokens can come at all, exactly."""
    model, count = talkative("llama"), 1500
    model.lm_head.weight.data *= 40  # a distribution with a head
    with torch.no_grad():
        logits = model(torch.tensor([LEAD])).logits[:, -1].float()
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    warpers |= {"min_p": MinPLogitsWarper, "typical_p": TypicalLogitsWarper}
    for name, value in shaping.items() if len(shaping) == 1 else ():
        logits = warpers[name](value)(torch.tensor([LEAD]), logits)
    expected = logits.double().softmax(-1)[0].numpy()
    options = {"do_sample": True, **shaping}
    found = generate(model, SpellOut(), [LEAD] * count, max_new_tokens=1, batch_size=500, options=options)
    drawn = np.bincount([int(g.text) for g in found], minlength=len(expected)) / count
    assert not drawn[expected == 0].any()
    assert np.abs(drawn - expected).sum() / 2 < 0.08 + 0.5 * (expected < 1 / count).dot(expected)


@pytest.mark.parametrize("shaping", [{"top_k": 5}, {"top_k": 5, "temperature": 0.7, "min_p": 0.2}])
def test_top_k_draws_what_all_of_the_vocabulary_would_give(shaping: dict) -> None:
    """By the sums over all of it, in float64, where several tokens are as likely as the fifth."""
    logits = (torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().float()
    logits[:, ::500] = logits.topk(5).values[:, -1:]
    names = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "min_p": MinPLogitsWarper}
    warpers = LogitsProcessorList([names[name](shaping[name]) for name in names if name in shaping])
    drawn = _Sampler(warpers, range(40))(torch.zeros(40, 1), logits)
    uniform = [
        torch.rand((), generator=torch.Generator().manual_seed(i), dtype=torch.float64).item() for i in range(40)
    ]
    for row, place, found in zip(warpers(torch.zeros(40, 1), logits).double().numpy(), uniform, drawn, strict=True):
        sums = np.exp(row - row.max()).cumsum()
        assert (found == 0).nonzero().flatten().tolist() == [int(np.searchsorted(sums, place * sums[-1], side="right"))]


CHECKPOINTS = [
    {"use_cache": False},
    {"num_beams": 2},
    {"num_beams": 2, "num_return_sequences": 2},
    {"return_dict_in_generate": True, "output_scores": True},
    {"cache_implementation": "static"},
    {"stop_strings": ["a"]},
    {"prompt_lookup_num_tokens": 3},
    {"repetition_penalty": 3.0},
    {"max_length": 13, "min_length": 10},
    {"forced_eos_token_id": 5},
    {"guidance_scale": 2.0},
]


@pytest.mark.parametrize("setting", CHECKPOINTS, ids=lambda setting: next(iter(setting)))
def test_a_checkpoints_generation_config_changes_nothing(setting: dict) -> None:
    model = talkative("llama")
    expected = [" ".join(map(str, ids)) for ids in one_by_one(model, PROMPTS, 6)]
    model.generation_config = config = GenerationConfig(**setting)
    before = config.to_dict()
    assert [g.text for g in generate(model, SpellOut(), PROMPTS, max_new_tokens=6)] == expected
    assert model.generation_config is config
    assert config.to_dict() == before


def test_a_model_without_a_generation_config_ends_where_its_configuration_says() -> None:
    model = talkative("llama")
    written = one_by_one(model, PROMPTS[:1], 5)[0]
    model.generation_config = None
    model.config.eos_token_id = written[2]
    found = generate(model, SpellOut(), PROMPTS[:1], max_new_tokens=5)
    end = written.index(written[2])
    assert found == [Generation(" ".join(map(str, written[:end])), True, tuple(written[: end + 1]))]
    assert model.generation_config is None


def test_tokens_that_a_model_must_not_write_are_not_written() -> None:
    model = talkative("llama")
    banned = one_by_one(model, PROMPTS[:1], 1)[0]
    model.generation_config.suppress_tokens = banned
    found = generate(model, SpellOut(), PROMPTS, max_new_tokens=6)
    assert not any(str(banned[0]) in g.text.split() for g in found)


OPTIONS = [
    {},
    {"repetition_penalty": 1.9},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[7], [300, 8]]},
    {"sequence_bias": [[[5], -9.0], [[9], 4.0]]},
    {"suppress_tokens": [3, 4]},
    {"begin_suppress_tokens": [3, 4]},
    {"min_new_tokens": 5},
    {"min_new_tokens": 12},
    {"eos_token_id": 11},
    {"eos_token_id": [11, 12, 13], "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "none")
def test_options_do_in_batches_what_they_do_to_one_prompt_alone(options: dict, batch_size: int) -> None:
    """Against a plain ``model.generate`` of each prompt, with padding that is the end token; the ends included."""
    model = make_model("llama")
    model.lm_head.weight.data *= 40
    ends = options.get("eos_token_id", [1, 40, 41, 50])
    model.generation_config = GenerationConfig(eos_token_id=[1, 40, 41, 50])
    expected = []
    for prompt in PROMPTS:
        given = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": ends, **options}
        new = model.generate(torch.tensor([prompt]), **given)[0, len(prompt) :].tolist()
        stop = next((i for i, token in enumerate(new) if token in (ends if isinstance(ends, list) else [ends])), None)
        whole = new if stop is None else new[: stop + 1]
        expected.append(Generation(" ".join(map(str, new[:stop])), stop is not None, tuple(whole)))
    found = generate(model, SpellOut(), PROMPTS, max_new_tokens=20, batch_size=batch_size, options=options)
    assert found == expected


def test_a_checkpoints_sampling_settings_do_not_make_it_sample(recwarn: pytest.WarningsRecorder) -> None:
    model = talkative("llama")
    expected = generate(model, SpellOut(), PROMPTS, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=7, top_p=0.3)
    assert generate(model, SpellOut(), PROMPTS, max_new_tokens=6) == expected
    assert model.generation_config.temperature == 5.0
    assert not [w for w in recwarn if "temperature" in str(w.message)]


def test_progress_counts_prompts() -> None:
    """After each token: of three that write four, 3/4 and 6/4 and 9/4 and 3 are done; the two others then likewise."""
    done: list[int] = []
    common = {"max_new_tokens": 4, "batch_size": 1, "options": {"min_new_tokens": 4}}
    generate(talkative("llama"), SpellOut(), PROMPTS, progress=done.append, **common)
    assert done == [0, 1, 2, 3, 3, 3, 4, 4, 5, 5]


def test_progress_of_what_ends_early_comes_to_all() -> None:
    model, done = talkative("llama"), []
    (first,) = generate(model, SpellOut(), PROMPTS[:1], max_new_tokens=1)
    options = {"eos_token_id": list(first.tokens)}
    (ended,) = generate(model, SpellOut(), PROMPTS[:1], max_new_tokens=50, options=options, progress=done.append)
    assert ended.finished
    assert done == [0, 1]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_the_head_sees_tokens_without_gaps(prompts: list[list[int]]) -> None:
    """With gaps, and weights that need no gradients, PyTorch multiplies by a copy of the weights for each row."""
    model = talkative("llama").requires_grad_(False)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0]))
    generate(model, SpellOut(), prompts, max_new_tokens=3)
    assert [x.stride() for x in seen] == [torch.empty(x.shape).stride() for x in seen]
    assert [x.shape[:2] for x in seen] == [(len(prompts), 1)] * 3


def test_the_model_is_left_as_it_was() -> None:
    model = talkative("llama")
    model.train()
    before = Untouched(model)
    generate(model, SpellOut(), PROMPTS, max_new_tokens=2)
    before.check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 0.5}, "'temprature' is not supported. Did you mean 'temperature'"),
        ({"num_beams": 2}, "'num_beams' is not supported"),
        ({"max_length": 20}, "Set max_new_tokens"),
        ({"stop_strings": ["x"]}, "A template says where its outputs stop"),
        ({"cache_implementation": "static"}, "'cache_implementation' is not supported"),
        ({"temperature": 0.5}, "'temperature' has no effect on greedy outputs"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"do_sample": True, "temperature": "hot"}, "refused"),
        ({"do_sample": True, "temperature": -1.0}, "refused"),
        ({"do_sample": True, "top_p": 2}, "refused"),
        ({"repetition_penalty": "much"}, "refused"),
        ({"bad_words_ids": [3]}, "refused"),
        ({"eos_token_id": "</s>"}, "refused"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict, said: str) -> None:
    model = talkative("llama")
    had = model.generation_config
    with pytest.raises(ThoughtError, match=f"generate: .*{re.escape(said)}"):
        generate(model, TOKENIZER, PROMPTS, options=options)
    assert model.generation_config is had


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ThoughtError, match="prompts is empty"):
        generate(talkative("llama"), TOKENIZER, [])
    with pytest.raises(ThoughtError, match=r"prompts\[1\] is empty; expected one token at least"):
        generate(talkative("llama"), TOKENIZER, [[5, 6], [], [7]])


def test_a_pad_token_that_the_model_has_not_is_not_used() -> None:
    class Padded(SpellOut):
        pad_token_id = 10_000

    model = talkative("llama")
    assert generate(model, Padded(), PROMPTS, max_new_tokens=6) == generate(
        model, SpellOut(), PROMPTS, max_new_tokens=6
    )
