"""A fit among Lightning's own callbacks, profilers and loggers, which it bears with the same patch or refuses by name;
and the module that loads its model."""

from __future__ import annotations

import csv
import functools
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fits import INSTRUCTION, PAIRS, TOKENIZER, Untouched, distance, identical, make_patch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from models import make_model
from tensorboardX.proto.event_pb2 import Event

from lit_thought import PairDataModule, ThoughtCallback, ThoughtError, ThoughtModule, load_model, transmute
from lit_thought.fit import module as module_file
from lit_thought.patch.display import bars, layer_figures
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.settings import SITES

SETTINGS: dict[str, Any] = {"preserve": None, "rank": 2, "ridge": 1e-2}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(
    *callbacks: Any,
    module: ThoughtModule | None = None,
    settings: dict = SETTINGS,
    ckpt_path: Any = None,
    **options: Any,
) -> ThoughtPatch:
    ours = ThoughtCallback(**settings)
    usual = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=-1, accelerator="cpu", callbacks=[*callbacks, ours], **{**usual, **options})
    trainer.fit(
        ThoughtModule(make_model(), TOKENIZER) if module is None else module,
        datamodule=PairDataModule(PAIRS, INSTRUCTION, answer_weight=1.0),
        ckpt_path=ckpt_path,
    )
    assert ours.patch is not None
    return ours.patch


COMPOSED: dict[str, Callable[[], dict[str, Any]]] = {
    "all defaults": lambda: {"enable_progress_bar": True, "enable_model_summary": True, "logger": True},
    "RichProgressBar": lambda: {"callbacks": [RichProgressBar()], "enable_progress_bar": True},
    "TQDMProgressBar": lambda: {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True},
    "DeviceStatsMonitor": lambda: {"callbacks": [DeviceStatsMonitor(cpu_stats=True)], "logger": CSVLogger("logs")},
    "LearningRateMonitor": lambda: {"callbacks": [LearningRateMonitor()], "logger": CSVLogger("logs")},
    "Timer": lambda: {"callbacks": [Timer(duration={"hours": 1})]},
    "ModelSummary": lambda: {"callbacks": [ModelSummary(2)], "enable_model_summary": True},
    "RichModelSummary": lambda: {"callbacks": [RichModelSummary(2)], "enable_model_summary": True},
    "LambdaCallback": lambda: {"callbacks": [LambdaCallback(on_train_epoch_end=lambda *_: None)]},
    "simple": lambda: {"profiler": "simple"},
    "advanced": lambda: {"profiler": "advanced"},
    "SimpleProfiler": lambda: {"profiler": SimpleProfiler("profile", "of")},
    "AdvancedProfiler": lambda: {"profiler": AdvancedProfiler("profile", "of")},
    "PyTorchProfiler": lambda: {"profiler": PyTorchProfiler("profile", "of")},
    "CSVLogger": lambda: {"logger": CSVLogger("logs")},
    "TensorBoardLogger": lambda: {"logger": TensorBoardLogger("logs")},
    "two loggers": lambda: {"logger": [CSVLogger("logs"), TensorBoardLogger("logs")]},
    "barebones": lambda: {
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "log_every_n_steps")),
        "barebones": True,
    },
    "others": lambda: {
        "deterministic": False,
        "detect_anomaly": True,
        "inference_mode": False,
        "num_sanity_val_steps": 0,
    },
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.filterwarnings("ignore")
def test_with_these_the_patch_is_the_same(name: str) -> None:
    options = COMPOSED[name]()
    model = make_model()
    untouched = Untouched(model)
    found = fit(*options.pop("callbacks", ()), module=ThoughtModule(model, TOKENIZER), **options)
    untouched.check()
    assert identical(found, make_patch(make_model(), rank=2))
    if (profiler := options.get("profiler")) is not None and not isinstance(profiler, str):
        (told,) = Path("profile").glob("*of.txt")
        assert "Profiler Report" in told.read_text(encoding="utf-8")
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: EarlyStopping("attn_out/error_left"), "EarlyStopping would end the fit"),
        (lambda: ModelCheckpoint("folder"), "ModelCheckpoint would save nothing.*output_dir .*resume_dir"),
        (lambda: ModelCheckpoint(monitor="attn_out/error_left"), "ModelCheckpoint would save nothing"),
        (lambda: ModelCheckpoint(filename="{epoch}"), "ModelCheckpoint would save nothing"),
        (lambda: ModelCheckpoint(save_last=True), "ModelCheckpoint would save nothing"),
        (lambda: ModelCheckpoint(every_n_train_steps=1), "ModelCheckpoint would save nothing"),
        (lambda: OnExceptionCheckpoint("folder"), "OnExceptionCheckpoint would save nothing"),
        (lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1), "StochasticWeightAveraging works on weights"),
        (EMAWeightAveraging, "EMAWeightAveraging works on weights that are trained, and a fit trains none"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning works on weights"),
        (SpikeDetection, "SpikeDetection works on weights"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_these_are_refused_by_name_before_the_model_is_loaded(callback: Callable[[], Any], said: str) -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    with pytest.raises(ThoughtError, match=f"callbacks: {said}"):
        fit(callback(), module=ThoughtModule(load))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_no_way_to_go_on() -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "callbacks": {}, "loops": {}}, "some.ckpt")
    with pytest.raises(ThoughtError, match=r"ckpt_path must be left out.*resume_dir keeps the finished stages"):
        fit(ckpt_path="some.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_fits_twice() -> None:
    """Though the checkpoint callback that it has added has a folder by then."""
    ours = ThoughtCallback(**SETTINGS)
    trainer = Trainer(max_epochs=-1, accelerator="cpu", callbacks=[ours], logger=False, enable_progress_bar=False)
    for seed in (1, 2):
        trainer.fit(
            ThoughtModule(make_model(seed=seed), TOKENIZER),
            datamodule=PairDataModule(PAIRS, INSTRUCTION, answer_weight=1.0),
        )
        assert ours.patch is not None
        assert identical(ours.patch, make_patch(make_model(seed=seed), rank=2))


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_keeps_its_own_settings() -> None:
    ours = ThoughtCallback(**SETTINGS, steps=2, pairs_per_step=2)
    trainer = Trainer(max_epochs=-1, accelerator="cpu", callbacks=[ours], logger=False, enable_progress_bar=False)
    trainer.fit(ThoughtModule(make_model(), TOKENIZER), datamodule=PairDataModule(PAIRS, INSTRUCTION))
    assert trainer.reload_dataloaders_every_n_epochs == 0


def test_of_a_fit_lightning_gives_no_advice_on_training() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        during = list(warnings.filters)
        fit(logger=CSVLogger("logs"))
        assert warnings.filters == during
    assert [str(one.message) for one in said if "lightning" in one.filename] == []
    assert warnings.filters == before


# --- the error left, by stage ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_loggers_get_what_each_solve_leaves_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watching(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            file = Path(self.log_dir) / "metrics.csv"
            seen.append(file.read_text(encoding="utf-8").count("\n") - 1 if file.exists() else 0)
            super().log_metrics(metrics, step)

    settings = {**SETTINGS, "sites": ("attn_out", "mlp_in"), "blocks": [0, 2], "steps": 2}
    loggers = [Watching("logs", "csv", ""), TensorBoardLogger("logs", "board", "")]
    patch = fit(settings=settings, logger=loggers)
    with Path("logs/csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert seen == list(range(8)), "each row can be read as soon as it is there"
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [(int(row["fit/block"]), SITES[int(row["fit/site"])]) for row in rows] == 2 * [
        (block, site) for block in (0, 2) for site in ("attn_out", "mlp_in")
    ]
    figures = list(patch.provenance["diagnostics"].values())  # of the second step
    wanted = [one["error_after"] / one["error_before"] for one in figures]
    assert len(wanted) == 4
    assert [float(row["fit/error_left"]) for row in rows[4:]] == pytest.approx(wanted, rel=1e-4)
    assert len(set(wanted)) == 4
    assert scalars(next(Path("logs/board").glob("events*")), "fit/error_left") == [
        (int(row["step"]), pytest.approx(float(row["fit/error_left"]), rel=1e-6)) for row in rows
    ]


def scalars(file: Path, tag: str) -> list[tuple[int, float]]:
    """The values in a TensorBoard file, by step; its records are length, its sum, the data, their sum."""
    content, found = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
        content = content[16 + length :]
    return found


# --- a module that loads its model -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_model().float().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore")
def test_a_model_by_name_is_loaded_by_the_fit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    genuine = load_model

    @functools.wraps(genuine)
    def counted(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return genuine(*args, **options)

    monkeypatch.setattr(module_file, "load_model", counted)
    module = ThoughtModule(saved, load={"dtype": "float64"})
    assert not calls
    found = fit(module=module)
    assert calls == [((saved,), {"dtype": "float64"})]
    assert module.model.dtype == torch.float64
    assert module.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert found.provenance["model"] == str(saved)
    assert identical(found, make_patch(genuine(saved, dtype="float64")[0], rank=2))
    assert (
        distance(found, transmute(str(saved), None, INSTRUCTION, PAIRS, progress=False, answer_weight=1.0, **SETTINGS))
        < 1e-4
    )


def test_a_process_that_is_spawned_loads_its_own(saved: Path) -> None:
    sent = pickle.dumps(ThoughtModule(str(saved)))
    assert len(sent) < 10_000
    assert pickle.loads(sent).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThoughtModule("gpt2", load={"dtyp": "float32"}), "load: .* got 'dtyp'. Did you mean 'dtype'"),
        (lambda: ThoughtModule("gpt2", load={"name": "gpt2"}), "load: load_model takes dtype, .*; got 'name'"),
        (lambda: ThoughtModule("gpt2", load=["dtype"]), "load must be keywords of load_model by name"),  # type: ignore[arg-type]
        (lambda: ThoughtModule("gpt2", TOKENIZER), "tokenizer comes with a model that is given by name"),
        (lambda: ThoughtModule(make_model(), TOKENIZER, load={}), r"load=\{\} says how .* Leave it out"),
        (lambda: ThoughtModule(lambda: (make_model(), TOKENIZER), load={"dtype": "float32"}), "load=.* Leave it out"),
        (lambda: ThoughtModule(make_model()), "tokenizer is missing"),
    ],
)
def test_arguments_that_do_not_belong_together(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ThoughtError, match=message):
        make()


def test_a_name_that_loads_nothing_is_an_error_of_its_own() -> None:
    module = ThoughtModule("./nothing")
    for _ in range(2):
        with pytest.raises(ThoughtError, match="nothing"):
            _ = module.model
    with pytest.raises(AttributeError, match="no attribute 'modl'"):
        _ = module.modl


def test_a_notebook_sees_the_error_by_block_as_it_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Place:
        def update(self, figure: Any) -> None:
            seen.append(figure._repr_html_())

    shell, shown = SimpleNamespace(kernel=object()), SimpleNamespace(display=lambda figure, display_id: Place())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    patch = make_patch(make_model(), progress=True)
    stages = layer_figures(patch.provenance)
    assert len(seen) == len(stages)
    for site, kind in (("attn_out", "self_attn.o_proj"), ("mlp_out", "mlp.down_proj")):
        left = [layer["error_left"] for layer in stages if layer["kind"] == kind]
        assert f">{bars(left)}<" in seen[-1]
        assert f">{bars(left[:1])}<" in seen[1]
        assert site in seen[-1]
    shell.kernel = None  # a terminal
    make_patch(make_model(), progress=True)
    assert len(seen) == len(stages)
