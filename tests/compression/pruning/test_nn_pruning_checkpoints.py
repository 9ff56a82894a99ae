"""Checkpoints that nn_pruning wrote come back as the models that they were."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.compression.pruning.nn_pruning_models import BATCH, RUNS, patched
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import prunelle
from prunelle.errors import InputError


def save(model: PreTrainedModel, coordinator: Any, folder: Path) -> None:
    """As its trainer does with transformers 4."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "sparse_args.json").write_text(json.dumps(dataclasses.asdict(coordinator.sparse_args)))


@pytest.mark.parametrize("run", RUNS)
def test_a_masked_checkpoint_is_read(run: str, tmp_path: Path) -> None:
    """Prevents a checkpoint from coming back dense, since stock classes pass over the scores that they do not know."""
    theirs, coordinator = patched(RUNS[run])
    coordinator.schedule_threshold(training=False)
    save(theirs, coordinator, tmp_path)
    ours, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        assert torch.equal(ours(**BATCH).logits, theirs(**BATCH).logits)
    ours.save_pretrained(tmp_path / "again")
    stock = type(ours).from_pretrained(tmp_path / "again")
    assert torch.equal(stock(**BATCH).logits, ours(**BATCH).logits)


def test_its_no_norms_are_read(tmp_path: Path) -> None:
    """Prevents LayerNorms from being put back, whose weights have the same names."""
    options = {"layer_norm_patch": True, "layer_norm_patch_steps": 6, "attention_pruning_method": "disabled"}
    theirs, coordinator = patched(options | {"attention_output_with_dense": False})
    for step in range(8):
        coordinator.schedule_threshold(step, 8, 1, training=True)
        theirs.train()(**BATCH)
    coordinator.schedule_threshold(training=False)
    logits = theirs.eval()(**BATCH).logits
    save(theirs, coordinator, tmp_path / "masked")
    with mock.patch.object(type(theirs), "prune_heads", prune_heads, create=True):
        coordinator.compile_model(theirs)
    assert theirs.config.layer_norm_type == "no_norm"
    torch.testing.assert_close(theirs(**BATCH).logits, logits)
    save(theirs, coordinator, tmp_path / "compiled")
    for folder in ("masked", "compiled"):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        prunelle.from_pretrained(str(tmp_path / folder), config=config)  # which stays as it is
        ours, loading = prunelle.from_pretrained(str(tmp_path / folder), config=config, output_loading_info=True)
        assert not any(loading.values()), loading
        torch.testing.assert_close(ours(**BATCH).logits, logits)
        ours.save_pretrained(tmp_path / "again")
        again = prunelle.from_pretrained(str(tmp_path / "again"))
        assert torch.equal(again(**BATCH).logits, ours(**BATCH).logits)


def test_a_compiled_checkpoint_is_read(tmp_path: Path) -> None:
    """Prevents heads that are counted wrong: its compiler takes them out, and the configuration alone says which."""
    theirs, coordinator = patched(RUNS["the published hybrid"])
    coordinator.schedule_threshold(training=False)
    with torch.no_grad():
        for name, scores in theirs.named_parameters():
            if ".self." in name and name.endswith("mask_scores"):
                scores.fill_(1.0)
                if ".value." in name:
                    scores[[1, 3] if "layer.0" in name else [0]] = -1.0
        logits = theirs(**BATCH).logits
    with mock.patch.object(type(theirs), "prune_heads", prune_heads, create=True):
        assert coordinator.compile_model(theirs) == (3, 8)
        torch.testing.assert_close(theirs(**BATCH).logits, logits)
    save(theirs, coordinator, tmp_path)
    ours = prunelle.from_pretrained(str(tmp_path))
    assert [shape["heads"] for shape in ours.config.layer_shapes] == [[0, 2], [1, 2, 3]]
    assert torch.equal(ours(**BATCH).logits, theirs(**BATCH).logits)
    ours.save_pretrained(tmp_path / "again")
    again = prunelle.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(again(**BATCH).logits, ours(**BATCH).logits)


def prune_heads(model: PreTrainedModel, heads: dict[int, list[int]]) -> None:
    """What transformers before 5 had for models."""
    model.config.pruned_heads = heads
    for number, gone in heads.items():
        attention = model.bert.encoder.layer[number].attention
        size = attention.self.attention_head_size
        kept = [place for place in range(model.config.hidden_size) if place // size not in gone]
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight, linear.bias = nn.Parameter(linear.weight[kept]), nn.Parameter(linear.bias[kept])
        attention.output.dense.weight = nn.Parameter(attention.output.dense.weight[:, kept])
        attention.self.num_attention_heads -= len(gone)
        attention.self.all_head_size = len(kept)


def test_scores_that_nobody_can_read_are_refused(tmp_path: Path) -> None:
    """Prevents a guess at how they become masks."""
    save(*patched({}), tmp_path)
    file = tmp_path / "sparse_args.json"
    file.write_text(json.dumps({"rewind_model_name_or_path": "somewhere"}))
    with pytest.raises(InputError, match="kept the heads of somewhere, whatever"):
        prunelle.from_pretrained(str(tmp_path))
    file.write_text(json.dumps({"final_treshold": 0.1}))
    with pytest.raises(InputError, match="final_treshold, which is none of nn_pruning's"):
        prunelle.from_pretrained(str(tmp_path))
    file.unlink()
    with pytest.raises(InputError, match="no sparse_args"):
        prunelle.from_pretrained(str(tmp_path))
