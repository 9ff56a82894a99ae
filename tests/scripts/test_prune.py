"""The road through the command line: a trained model in, one of the density asked for out."""

import json
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.compression import from_pretrained
from prunelle.compression.anatomy import dissect
from prunelle.export import export_onnx, report_on_sequences
from prunelle.export.runner import OnnxRunner
from prunelle.scripts import _closing


@pytest.fixture
def sound(reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path) -> dict[str, str]:
    """Flags of a run that would work."""
    named = dict(zip(short_run[::2], short_run[1::2], strict=True))
    return {**reviews, **named, "--model_name_or_path": teacher, "--output_dir": str(tmp_path / "run")}


def prune(flags: dict[str, str], *more: str) -> int:
    return main(["prune", *(word for pair in flags.items() for word in pair), *more])


def test_a_trained_model_is_pruned_with_itself_as_teacher(
    sound: dict[str, str], teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a checkpoint that only this package loads, a density beside the one asked for, and a lost accuracy."""
    flags = {"--teacher_name_or_path": teacher, "--density": "0.3", "--learning_rate": "1e-3"}
    assert prune(sound | flags, "--num_train_epochs", "4", "--excluded_modules", "*.0.*.query") == 0
    assert "onnx-int8" in capsys.readouterr().out
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert record["methods"] == ["distill", "prune"]
    assert len(record["density"]) == 4 * 6 - 1
    for name, density in record["density"].items():
        weight = pruned.get_parameter(name)
        assert weight.count_nonzero().item() == round(density * weight.numel())
        assert abs(density * weight.numel() - 0.3 * weight.numel()) <= 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    accuracy = {m["name"]: m["metrics"]["accuracy"] for m in report["models"]}
    assert accuracy["student"] > 0.9


def test_heads_dimensions_and_layers_are_taken_out(sound: dict[str, str], teacher: str, tmp_path: Path) -> None:
    """Prevents zeros that are sold as speed: the checkpoint and the ONNX file are those of the small model."""
    flags = {"--teacher_name_or_path": teacher, "--relation_weight": "1", "--pruned_layers": "2"}
    structure = ["--structure", "layers", "heads", "ffn", "--density", "0.5", "0.5", "0.4", "--round_to", "4"]
    assert prune(sound | flags, *structure, "--learning_rate", "1e-3") == 0
    small, dense = from_pretrained(str(tmp_path / "run")), from_pretrained(teacher)
    assert [(layer.heads.count, layer.ffn.count) for layer in dissect(small)] == [(1, 28)] * 3  # of 64, 26 are left
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert [shape["ffn"] for shape in record["layer_shapes"]] == [28] * 3
    assert record["kept_layers"] == [0, 1, 3]
    assert len(record["density"]) == 4 * 6
    picture = ElementTree.parse(tmp_path / "run" / "density.svg").getroot()
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert "0 intermediate.dense: 40.62 % of its weights are left" in titles  # 26 of 64
    assert sum(title.endswith(": 0.00 % of its weights are left") for title in titles) == 6
    files = [Path(folder) / "onnx" / "model.onnx" for folder in (tmp_path / "run", tmp_path / "dense")]
    export_onnx(dense, files[1])
    assert files[0].stat().st_size < 0.85 * files[1].stat().st_size
    words = torch.arange(5, 15)[None]
    logits = OnnxRunner(files[0], "onnx", parameters=0)({"input_ids": words, "attention_mask": torch.ones_like(words)})
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(logits), small(words).logits, rtol=0, atol=1e-4)


def test_layers_alone_are_taken_out(sound: dict[str, str], tmp_path: Path) -> None:
    """Prevents a picture without a matrix in it, at the end of a run that masked none."""
    assert prune(sound, "--structure", "layers", "--pruned_layers", "1", "3", "--max_steps", "8") == 0
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert (record["kept_layers"], record["density"]) == ([0, 2], {})
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.num_hidden_layers == 2


def test_arguments_of_nn_pruning_are_followed(sound: dict[str, str], teacher: str, tmp_path: Path) -> None:
    """Prevents a file that says what is distilled, and at what weights, from being followed by half."""
    arguments = {
        "attention_block_rows": 8,
        "attention_block_cols": 8,
        "dense_pruning_method": "topK:1d_alt",
        "final_threshold": 0.25,
        "distil_teacher_name_or_path": teacher,
        "distil_alpha_ce": 0.1,
        "distil_alpha_teacher": 0.9,
    }
    (tmp_path / "sparse_args.json").write_text(json.dumps(arguments))
    flags = {"--nn_pruning_config": str(tmp_path / "sparse_args.json"), "--warmup_steps": "2", "--temperature": "4"}
    assert prune(sound | flags) == 0
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert record["methods"] == ["distill", "prune"]
    assert {density for name, density in record["density"].items() if ".self." in name} == {0.25}
    assert [shape["ffn"] for shape in record["layer_shapes"]] == [16] * 4
    last = [line for line in record["training"] if "loss_soft_target" in line][-1]
    assert "loss_hidden_cosine" not in last
    assert last["loss"] == pytest.approx(0.9 * last["loss_soft_target"] + 0.1 * last["loss_hard_label"], rel=1e-3)
    assert (last["density_attention"], last["density_dense"]) == (0.25, 0.25)


def test_a_model_is_pruned_on_labels_alone(sound: dict[str, str], tmp_path: Path) -> None:
    """Prevents a teacher from being needed."""
    flags = {"--density": "0.5", "--score": "magnitude", "--ranking": "global", "--save_sparse": "true"}
    assert prune(sound | flags) == 0
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert record["methods"] == ["prune"]
    assert len(set(record["density"].values())) > 12
    assert [file.name for file in (tmp_path / "run").glob("*.safetensors")] == ["model_sparse.safetensors"]
    assert "prunelle.from_pretrained(" in (tmp_path / "run" / "README.md").read_text()
    model = from_pretrained(str(tmp_path / "run"))
    for name, density in record["density"].items():
        weight = model.get_parameter(name)
        assert weight.count_nonzero().item() == round(density * weight.numel())


def test_a_trained_model_loses_the_tokens_that_the_data_never_uses(
    sound: dict[str, str], teacher: str, tmp_path: Path
) -> None:
    """Prevents a training that is needed, ids that the exported file or the teacher reads otherwise, and a stale
    tokenizer beside the model."""
    few = tmp_path / "few.csv"
    few.write_text("sentence,label\nthe film was lovely,good\nthe film was dull,bad\na dull story,bad\n")
    data = {"--train_file": str(few), "--validation_file": str(few), "--test_file": str(few)}
    flags = {"--teacher_name_or_path": teacher, "--density": "1", "--num_train_epochs": "0"}
    assert prune(sound | data | flags, "--prune_vocabulary", "train", "validation") == 0
    before, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (teacher, tmp_path / "run"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(tokenizer) < len(before)
    assert tokenizer.tokenize("a lovely film") == before.tokenize("a lovely film")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    differences = {m["name"]: m["max_abs_logit_difference"] for m in report["models"]}
    assert differences["teacher"] < 1e-5
    assert differences["onnx"] < 1e-4


def test_encoder_and_decoder_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a decoder that stays dense, or that the picture shows in the encoder's place."""
    monkeypatch.setattr(_closing, "report_on_sequences", partial(report_on_sequences, latency_seconds=0))
    pairs, config = str(tmp_path / "pairs.jsonl"), {"model_type": "t5", "vocab_size": 300, "d_model": 16, "d_kv": 8}
    config |= {"d_ff": 24, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    Path(pairs).write_text("\n".join(json.dumps({"document": f"{n} red {n}", "summary": f"{n}"}) for n in range(40)))
    words = ["--task", "sequence-to-sequence", "--train_file", pairs, "--validation_file", pairs]
    words += ["--max_seq_length", "16", "--max_target_length", "12", "--max_eval_samples", "8", "--max_steps", "6"]
    words += ["--model_config", json.dumps(config), "--disable_tqdm", "true", "--save_strategy", "no"]
    assert main(["prune", *words, "--output_dir", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert len(record["density"]) == 6 + 10
    assert all(density == pytest.approx(0.5, abs=0.01) for density in record["density"].values())
    assert (tmp_path / "run" / "density.svg").read_text().count(" % of its weights are left") == 6 + 10


SPOILED = {
    "tokens of no data": ({"--prune_vocabulary": "unlabeled"}, r"--prune_vocabulary unlabeled: the data has train, va"),
    "a density of 0": ({"--density": "0"}, r"a density of 0\.0 must be above 0 and at most 1"),
    "percent": ({"--density": "15"}, r"a density of 15\.0 must be above 0 and at most 1"),
    "no such module": ({"--pruned_modules": "*.atention.*"}, r"the pattern \*\.atention\.\* matches none of the 26 "),
    "too short a run": ({"--max_steps": "2"}, r"the run has 2 optimizer steps.* from step 0\.2 to step 1\.4"),
    "no room to prune": ({"--pruning_warmup": "0.7"}, r"0\.7 and a cool-down of 0\.3 leave nothing"),
    "no room to change": (
        {"--schedule": "one_shot", "--score": "magnitude", "--gelu_to_relu": "true"}
        | {"--pruning_warmup": "0.5", "--pruning_cooldown": "0.5"},
        r"0\.5 and a cool-down of 0\.5 leave nothing",
    ),
    "no such structure": ({"--structure": "head"}, r"no structure head: give weights, rows, columns, heads, ffn, "),
    "a block too large": ({"--structure": "64x64"}, r"64x64 does not divide \S*query, which has 32 outputs and 32 "),
    "no layers to choose from": ({"--pruned_layers": "1"}, "--pruned_layers needs --structure layers"),
    "layers without magnitude": ({"--structure": "layers", "--score": "magnitude"}, "layers have no magnitude"),
    "rounded to nothing": ({"--round_to": "0"}, r"--round_to 0 must be at least 1"),
    "no such score": ({"--score": "momentum"}, r"--score.*'momentum'"),
    "nothing learned yet": ({"--schedule": "one_shot"}, r"movement scores are learned in training, and this schedule"),
    "heads of weights": ({"--score": "head_importance"}, r"head_importance ranks heads, not weights"),
    "rows of blocks": ({"--ranking": "row", "--structure": "8x8"}, r"where weights go one by one, not for 8x8"),
    "an idle warm-up": (
        {"--schedule": "one_shot", "--score": "wanda", "--pruning_warmup": "0.2"},
        r"one_shot has no --pruning_warmup",
    ),
    "rounds of nothing": ({"--pruning_rounds": "2"}, r"--pruning_rounds and --rewind are for --schedule iterative"),
    "back to where": ({"--rewind_to": "0.5"}, r"--rewind_to says where --rewind learning_rate or --rewind weights"),
    "too many rounds": (
        {"--schedule": "iterative", "--pruning_rounds": "5", "--max_steps": "4", "--rewind": "weights"},
        r"the run has 4 optimizer steps, too few for 5 rounds: weights would go before the steps 1, 2, 2, 3, 4,",
    ),
    "no examples": ({"--calibration_samples": "0"}, r"--calibration_samples 0 must be at least 1"),
    "an empty row": ({"--score": "wanda", "--density": "0.01"}, r"keeps none of the 32 weights in a row of"),
    "a penalty on nothing": ({"--score": "magnitude", "--score_penalty": "1"}, r"--score magnitude learns none"),
    "a penalty that is no number": ({"--score_penalty": "nan"}, r"--score_penalty nan must be a number, and not neg"),
    "a rate of nothing": (
        {"--score": "wanda", "--score_learning_rate": "5"},
        r"--score_learning_rate .* wanda learns none",
    ),
    "a start of nothing": (
        {"--score": "random", "--score_init": "noise"},
        r"--score_init .* --score random learns none",
    ),
    "examples of nothing": ({"--calibration_samples": "7"}, r"--calibration_samples needs --score wanda or head_imp"),
    "modules of layers": ({"--structure": "layers", "--excluded_modules": "*.0.*"}, r"--excluded_modules chooses mod"),
    "layers at random": (
        {"--structure": "layers", "--score_init": "noise"},
        r"--score_init .*: their scores begin at 0",
    ),
    "rounded and not taken out": ({"--round_to": "4"}, r"--round_to needs --shrink true"),
    "scores that stand still": ({"--score_learning_rate": "0"}, r"--score_learning_rate 0\.0 must be a number above 0"),
    "a loss without its teacher": ({"--temperature": "4"}, r"give --teacher_name_or_path, or no --temperature"),
    "no such teacher": ({"--teacher_name_or_path": "nowhere"}, r"no folder nowhere"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_flag_is_named(
    sound: dict[str, str], change: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hours of training on a typing error."""
    capsys.readouterr()
    assert prune(sound | change) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(expected, line)
    assert not list(Path(sound["--output_dir"]).glob("*.safetensors"))
