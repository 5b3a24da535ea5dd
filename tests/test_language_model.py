"""The recipe for language models in ``examples/language_model``, with a model of random weights that reads bytes."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import free_ports, results_of_ranks
from torch import Tensor

from triton_analog import launch

EXAMPLE = Path(__file__).parents[1] / "examples" / "language_model"
NAMES = [path.stem for path in EXAMPLE.glob("*.py")]
VOCABULARY, LENGTH, RANKS = 258, 16, 2

pytest.importorskip("transformers", reason="transformers is an optional peer: make test-peers installs it")
pytest.importorskip("peft", reason="peft is an optional peer: make test-peers installs it")


def modules() -> SimpleNamespace:
    """The files of the example, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(EXAMPLE))


example = modules()


def save_teacher(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<begin>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the teacher and its text."""
    made = tmp_path_factory.mktemp("language_model")
    save_teacher(made / "teacher")
    write(made / "teacher", made / "text")
    return made


def write(teacher: Path, text: Path, *more: str) -> None:
    options = f"--teacher {teacher} --out {text} --tokens 384 --length {LENGTH} --batch 8 --held-out 4 --device cpu"
    example.generate.main([*options.split(), *more])


def train(folder: Path, out: Path, options: str) -> None:
    """A few steps, of which the ranges start up in the first ones."""
    common = (
        f"--teacher {folder / 'teacher'} --data {folder / 'text'} --out {out} --batch 2 --length {LENGTH} --start-up 4 "
        "--learning-rate 1e-2 --log-every 2 --save-every 3 --analyze-every 4 --device cpu"
    )
    with (
        launch.backend("reference") if "cuda" not in options else nullcontext()
    ):  # fixtures of a module come before a test's
        example.train.main([*common.split(), *options.split()])


def weights(out: Path) -> dict[str, Tensor]:
    return example.checkpoints.load_file(example.checkpoints.latest(out) / example.checkpoints.MODEL)


# ---- Recipe ---------------------------------------------------------------------------------------------------------------


def test_the_distillation_is_the_divergence_of_the_student_from_the_teacher() -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.float32)
    student.requires_grad_()
    p, q = teacher.double().softmax(-1), student.detach().double().softmax(-1)
    loss = example.recipe.distillation(student, teacher)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(student.grad, ((q - p) / 6).float())  # 6 tokens


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    rates = [example.recipe.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[:16] == pytest.approx([(step + 1) / 16 for step in range(16)])
    assert rates[16:] == pytest.approx([(1000 - step) / 984 for step in range(16, 1000)])
    assert max(rates) == 1.0


# ---- Text -----------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_their_chances() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20_000
    for top, chances in ((0, logits.softmax(0)), (2, torch.tensor([-math.inf, 1.0, 2.0, -math.inf]).softmax(0))):
        drawn = example.generate.draw(logits.expand(draws, 4), top, torch.Generator().manual_seed(0))
        assert drawn.shape == (draws, 1)
        shares = drawn.flatten().bincount(minlength=4) / draws
        assert ((shares - chances).abs() <= 4 * (chances * (1 - chances) / draws).sqrt()).all()


def test_writing_goes_on_from_what_was_written(folder: Path) -> None:
    """With one token to draw from, the likeliest: of a forward without any cache."""
    teacher, _ = example.teacher.load(folder / "teacher")
    tokens = example.generate.write(teacher, begin=3, count=2, length=LENGTH, top=1, seed=0)
    assert (tokens[:, 0] == 3).all()
    with torch.no_grad():
        likeliest = teacher(input_ids=tokens.clone(), use_cache=False).logits.argmax(-1)
    assert torch.equal(tokens[:, 1:], likeliest[:, :-1])


def test_shards_that_are_there_stay_and_the_others_come_out_the_same(folder: Path, tmp_path: Path) -> None:
    shards = {path.name: path.read_bytes() for path in (folder / "text").glob("*.npy")}
    assert shards.keys() == {"held-out.npy", "00000.npy", "00001.npy", "00002.npy"}
    assert len(set(shards.values())) == 4
    write(folder / "teacher", tmp_path, "--minutes", "0")  # writes nothing
    for name in ("00000.npy", "held-out.npy"):
        (tmp_path / name).write_bytes(shards[name])
    (tmp_path / "00001.part").write_bytes(shards["00001.npy"][:100])  # as a killed run leaves it
    before = (tmp_path / "00000.npy").stat().st_mtime_ns
    write(folder / "teacher", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")} == shards
    assert (tmp_path / "00000.npy").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="was begun with seed 0; take those, or another folder"):
        write(folder / "teacher", tmp_path, "--seed", "1")


def test_an_epoch_visits_every_sequence_of_shards_and_texts_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("x" * (5 * LENGTH + 3))
    _, tokenizer = example.teacher.load(folder / "teacher")
    data = example.data.read([folder / "text", tmp_path / "my.txt"], tokenizer, LENGTH)
    assert len(data) == 3 * 8 + 5
    epochs = [data.batch(number * 29, 29, seed=1) for number in range(2)]
    sequences = sorted(row.tolist() for row in epochs[0])
    assert sequences == sorted(row.tolist() for row in epochs[1])
    assert sequences == sorted(data[number].tolist() for number in range(29))
    assert not torch.equal(*epochs)
    assert torch.equal(
        torch.cat([data.batch(27, 2, 1), data.batch(29, 2, 1)]), torch.cat([epochs[0][-2:], epochs[1][:2]])
    )
    with pytest.raises(SystemExit, match="--length: 8, but the sequences on the disk have 16 tokens"):
        example.data.read([folder / "text"], tokenizer, 8)


def test_a_small_model_is_cut_out_of_a_larger_one(folder: Path) -> None:
    model, tokenizer = example.teacher.load(folder / "teacher")
    small, fewer = example.teacher.cut(model, tokenizer, blocks=1, vocabulary=VOCABULARY - 3)
    assert len(example.teacher.blocks_of(small)) == 1
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[:-3])
    assert torch.equal(small.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    text = "bytes, as before"
    assert fewer(text).input_ids == tokenizer(text).input_ids
    assert len(fewer) == VOCABULARY - 3


# ---- Training -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, and nothing is saved any more."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.journal.Journal, "write", writing_until(step, example.journal.Journal.write))
        with pytest.raises(Killed):
            yield


def writing_until(last: int, write: Callable[..., None]) -> Callable[..., None]:
    def until(self: Any, kind: str, step: int, numbers: dict[str, float]) -> None:
        write(self, kind, step, numbers)
        if step >= last:
            raise Killed

    return until


def result(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Files and log lines, without the clock."""
    checkpoint = example.checkpoints.latest(out)
    lines = example.journal.entries(out)
    for line in lines:
        if line["kind"] == "training":
            del line["seconds"], line["tokens_per_second"]
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}, lines


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Path]:
    """Weights and adapters, without an interruption."""
    for name, options in OPTIONS.items():
        train(folder, folder / name, options)
    return {name: folder / name for name in OPTIONS}


OPTIONS = {"weights": "--steps 8", "adapters": "--steps 8 --adapters 2"}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_killed_training_ends_as_one_that_was_not(
    kind: str, folder: Path, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = OPTIONS[kind]
    train(folder, tmp_path, f"{options} --minutes 0")  # saves and stops at its first line
    assert "out of time after 2 of 8 steps" in capsys.readouterr().out
    with killed_at(
        4
    ):  # of which nothing but the line is left: the last checkpoint is that of step 3, amid the start-up
        train(folder, tmp_path, options)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000003"]
    assert example.journal.entries(tmp_path)[-1]["step"] == 4
    with killed_at(6):
        train(folder, tmp_path, options)
    train(folder, tmp_path, options)
    (files, lines), (resumed_files, resumed_lines) = result(trained[kind]), result(tmp_path)
    assert resumed_lines == lines
    assert resumed_files == files
    assert [line["step"] for line in lines if line["kind"] == "training"] == [2, 4, 6, 8]
    train(folder, tmp_path, options)  # it is over: nothing happens
    assert result(tmp_path) == (files, lines)


def test_what_is_trained_and_logged(folder: Path, trained: dict[str, Path]) -> None:
    teacher, _ = example.teacher.load(folder / "teacher")
    before, after = teacher.state_dict(), weights(trained["weights"])
    assert after.keys() & before.keys() == before.keys() - {"lm_head.weight"}  # that is the embeddings'
    assert all(not torch.equal(after[name], before[name]) for name in after.keys() & before.keys())
    counters = [value for name, value in after.items() if name.endswith("input_range_update_idx")]
    assert len(counters) == 14
    assert {int(counter) for counter in counters} == {4}
    for kind in OPTIONS:
        losses = [line["loss"] for line in example.journal.entries(trained[kind], "training")]
        assert losses[-1] < losses[0]
        (first, last) = example.journal.entries(trained[kind], "analysis")
        for measured in ("clipped", "saturated", "snr_db", "input_range"):
            assert sum(name.endswith(measured) for name in last) == 14
        ranges = [name for name in last if name.endswith("input_range")]
        assert all((first[name] == last[name]) == (kind == "adapters") for name in ranges)
    frozen = {name: value for name, value in weights(trained["adapters"]).items() if name.endswith("base_layer.weight")}
    assert len(frozen) == 14
    for name, value in frozen.items():
        digital = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(value, before[digital])


def test_other_options_are_refused(folder: Path, trained: dict[str, Path]) -> None:
    with pytest.raises(
        SystemExit, match=r"step-0000008 was trained with --learning_rate 0\.01; take those, or another --out"
    ):
        train(folder, trained["weights"], "--steps 8 --learning-rate 1e-3")
    with pytest.raises(SystemExit, match="--way: got graph; graphs are for one process on a GPU"):
        train(folder, folder / "none", "--steps 8 --way graph")


def test_activations_that_are_computed_again_train_the_same(folder: Path, tmp_path: Path) -> None:
    for name in ("", "--checkpointing"):
        train(folder, tmp_path / f"again{name}", f"--steps 3 {name}")
    plain, again = weights(tmp_path / "again"), weights(tmp_path / "again--checkpointing")
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_bf16_keeps_its_parameters_in_fp32(folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    train(folder, tmp_path, "--steps 8 --precision bf16")
    exact, rough = (example.journal.entries(out, "training")[-1]["loss"] for out in (trained["weights"], tmp_path))
    assert rough == pytest.approx(exact, rel=0.2)
    assert rough != exact
    assert {value.dtype for name, value in weights(tmp_path).items() if name.endswith("weight")} == {torch.float32}


def test_a_checkpoint_is_a_pretrained_model(folder: Path, trained: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from triton_analog.integrations.transformers import from_pretrained

    teacher, _ = example.teacher.load(folder / "teacher")
    checkpoint = example.checkpoints.latest(trained["weights"])
    models = from_pretrained(AutoModelForCausalLM, checkpoint), example.evaluate.restored(checkpoint, teacher).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        first, second = (model(input_ids=tokens).logits for model in models)
    assert torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_trains_as_python_does(folder: Path, tmp_path: Path) -> None:
    for way in ("python", "graph"):
        train(folder, tmp_path / way, f"--steps 14 --way {way} --device cuda")
    python, graph = (example.journal.entries(tmp_path / way, "training") for way in ("python", "graph"))
    assert [line["loss"] for line in graph] == pytest.approx([line["loss"] for line in python], rel=0.02)


# ---- Several processes ----------------------------------------------------------------------------------------------------


TRAININGS = [
    (layout, *run)
    for layout in ("ddp", "fsdp")
    for run in ((f"{layout}-resumed", "--minutes 0"), (f"{layout}-resumed", ""), (layout, ""))
]


def one_rank(rank: int, port: int, folder: Path, ports: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    for own, (layout, out, steps) in zip(ports, TRAININGS, strict=True):
        os.environ["MASTER_PORT"] = str(
            own
        )  # its own: a rank that comes early would meet the ranks of the training before
        train(folder, folder / out, f"--steps 5 --layout {layout} {steps}")


def test_several_processes_train_whole_and_sharded_models_alike(folder: Path) -> None:
    results_of_ranks(one_rank, RANKS, folder, free_ports(len(TRAININGS)))
    for layout in ("ddp", "fsdp"):
        assert result(folder / layout) == result(folder / f"{layout}-resumed")
    whole, sharded = weights(folder / "ddp"), weights(folder / "fsdp")
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4)


# ---- Evaluation -----------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, trained: dict[str, Path], out: Path, *more: str) -> dict[str, Any]:
    options = (
        f"--teacher {folder / 'teacher'} --text {folder / 'text'} --trained {trained['weights']} "
        f"--adapters {trained['adapters']} --out {out} --length {LENGTH} --sequences 2 --batch 2 "
        "--chips 2 --chips-over-time 1 --device cpu"
    )
    example.evaluate.main([*options.split(), *more])
    return json.loads(out.read_text())


def test_the_table(folder: Path, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evaluation.json"
    stopped = evaluate(folder, trained, file, "--minutes", "0")
    assert stopped["rows"] == {"original": {}}
    found = evaluate(folder, trained, file)
    rows, evaluation = found["rows"], example.evaluate
    assert rows.keys() == evaluation.ROWS.keys()
    for row in rows.values():
        assert {name: len(chips) for name, chips in row.items()} == {
            evaluation.NO_NOISE: 1, evaluation.POLYNOMIAL: 2, **dict.fromkeys(evaluation.PCM, 1)
        }  # fmt: skip
        first, second = row[evaluation.POLYNOMIAL]
        assert first.keys() == {"licences", "docstrings", evaluation.OWN}
        assert first != second
    teacher, tokenizer = example.teacher.load(folder / "teacher")
    for name, tokens in evaluation.held_out(tokenizer, folder / "text", LENGTH, 2).items():
        with torch.no_grad():
            loss = teacher(input_ids=tokens, labels=tokens).loss.item()
        assert rows["original"][evaluation.NO_NOISE][0][name] == pytest.approx(math.exp(loss), rel=1e-4)
        assert rows["trained"][evaluation.NO_NOISE][0][name] != rows["calibrated"][evaluation.NO_NOISE][0][name]

    lost = json.loads(file.read_text())
    del lost["rows"]["trained"][evaluation.POLYNOMIAL][1], lost["rows"]["8 bits"]["PCM, 1 year"]
    lost["rows"]["8 bits"].pop("PCM, 1 s"), lost["rows"]["8 bits"].pop("PCM, 1 day")
    file.write_text(json.dumps(lost))
    assert evaluate(folder, trained, file) == found
    with pytest.raises(SystemExit, match="has numbers of other settings"):
        evaluate(folder, trained, file, "--sequences", "1")

    for name, kind in (("trained", "weights"), ("adapters", "adapters")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_bytes((trained[kind] / "log.jsonl").read_bytes())
    common = f"--teacher {folder / 'teacher'} --batch 2 --length {LENGTH} --steps 1 --device cpu"
    example.throughput.main([*common.split(), "--out", str(tmp_path / "throughput.json")])
    capsys.readouterr()
    example.report.main(["--from", str(tmp_path), "--out", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "results" / "results.md").read_text().strip()
    assert printed.count("| (d) trained for tiles |") == 3
    base = rows["original"][evaluation.NO_NOISE][0]["docstrings"]
    means = [
        sum(chip["docstrings"] for chip in rows[row][evaluation.POLYNOMIAL]) / 2 - base
        for row in ("calibrated", "trained")
    ]
    assert f"| docstrings | {means[0]:.2f} | {means[1]:.2f} | {means[1] / means[0]:.2f} |" in printed
    assert "Training of all weights: 8 steps, 0.00 million tokens" in printed
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert written["rows"] == rows
    assert [line["step"] for line in written["curves"]["trained"]] == [2, 4, 6, 8]
    for name in ("curves.png", "perplexity.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
