"""What tools.inspect runs a model on: its own data, another checkpoint's, other text; and mistakes in one line."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from models.loss import IGNORE
from pretrain.config import CheckpointConfig
from pretrain.data import open_source
from pretrain.data.preparation import Settings, prepare
from tests.tools import calling
from tests.tools.small_run import prepare_small, small_config, small_text, train_small
from tools import inspect
from tools.inspecting.subject import mean_loss, open_subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DNT with documents kept apart, two of whose checkpoints were kept."""
    folder = tmp_path_factory.mktemp("inspect")
    config = small_config(folder, prepare_small(folder))
    dnt = replace(
        config,
        name="dnt",
        model=replace(config.model, plan="dnt", kv_heads=1, tied=True),
        data=replace(config.data, document_mask=True),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    return train_small(dnt)[1]


call = partial(calling.call, inspect.main)
fails = partial(calling.fails, inspect.main)


def test_what_the_model_is_run_on(trained: Path) -> None:
    """Gradients: what would be trained on next. The rest: held-out windows, on which the loss is the run's own."""
    subject = open_subject(trained, "dnt", None, 1000, None, CPU)
    source = open_source(subject.config.data, subject.config.seed)
    rows = torch.from_numpy(source.read(range(16, 1016)))  # four steps of four sequences are behind it
    assert subject.training.inputs.equal(rows[:, :-1])
    assert source.validation is not None
    assert len(subject.held_out.inputs) == source.validation.count < 1000
    last = subject.records[-1]
    assert last["step"] == subject.step == 4
    assert mean_loss(subject, subject.held_out) == pytest.approx(last["val_loss"], abs=1e-5)
    ends = rows[:, :-1] == source.eos
    assert (subject.training.targets.eq(IGNORE) == ends).all()
    assert subject.training.documents is not None


def test_an_earlier_checkpoint(trained: Path) -> None:
    """Its own weights, its place in the data, and the metrics up to it."""
    now, before = (open_subject(trained, "dnt", step, 2, None, CPU) for step in (None, 2))
    assert (now.step, before.step, before.records) == (4, 2, []), "the first line is of step 4"
    assert [record["step"] for record in now.records] == [4]
    assert not now.model.embedding.weight.equal(before.model.embedding.weight)
    whole = open_subject(trained, "dnt", 2, 10, None, CPU)
    assert whole.training.inputs[8:].equal(now.training.inputs), "eight sequences are two steps"
    assert before.held_out.inputs.equal(now.held_out.inputs)


def test_other_text(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(small_text(7, 300))
    subject = open_subject(trained, "dnt", None, 4, [text], CPU)
    assert subject.training.inputs.shape == (4, 32)
    assert subject.training.inputs.equal(subject.held_out.inputs)
    assert subject.training.targets[:, :-1].equal(subject.training.inputs[:, 1:])


def test_mistakes_are_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'spectra'" in fails(monkeypatch, capsys, trained, "--only", "spectrum")
    assert "names none" in fails(monkeypatch, capsys, trained, "--only", ",")
    assert "not a run's folder" in fails(monkeypatch, capsys, tmp_path / "missing")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((trained / "config.yaml").read_text())
    assert "no checkpoint yet" in fails(monkeypatch, capsys, bare)
    assert "of other steps, 2, 4" in fails(monkeypatch, capsys, trained, "--step", "3")
    assert "2 or more" in fails(monkeypatch, capsys, trained, "--sequences", "1")
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    assert "two sequences of 32" in fails(monkeypatch, capsys, trained, "--text", short)
    assert "cannot read" in fails(monkeypatch, capsys, trained, "--text", tmp_path / "nowhere.txt")
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = fails(
        monkeypatch, capsys, trained, "--only", "entropy", "--sequences", "2", "--output", blocked / "report"
    )
    assert "cannot write the report" in message
    if not torch.cuda.is_available():
        assert "no GPU" in fails(monkeypatch, capsys, trained, "--device", "cuda")
    for name in ("matplotlib", "scipy", "markdown"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda asked, lacking=name: None if asked == lacking else asked)
            assert f"pip install {name}" in fails(patch, capsys, trained)


def test_other_data_in_the_run_s_place(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer that is not the run's would make its text noise."""
    path, moved = trained / "tokenizer.model", tmp_path / "tokenizer.model"
    moved.write_bytes(path.read_bytes())
    try:
        path.write_bytes(_other_tokenizer(tmp_path, monkeypatch).read_bytes())
        capsys.readouterr()
        assert "another tokenizer by now" in fails(monkeypatch, capsys, trained)
    finally:
        path.write_bytes(moved.read_bytes())


def _other_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    (folder / "other.jsonl").write_text("".join(f'{{"text": "{small_text(i, 60)}"}}\n' for i in range(40)))
    prepare(
        [str(folder / "other.jsonl")], folder / "other", Settings(vocab_size=290, validation_fraction=0.2), workers=1
    )
    return folder / "other" / "tokenizer.model"
