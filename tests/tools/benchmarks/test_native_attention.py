"""The benchmark of other projects' models with our sampling, on a small one."""

import json

import native_attention
import pytest
import torch


def tiny_detector():
    return native_attention.deformable_detr(
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )


def test_a_table_of_both_forms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native_attention, "MODELS", {"tiny": tiny_detector})
    file = tmp_path / "times.json"
    threads = torch.get_num_threads()
    native_attention.main(["--size", "96", "--rounds", "2", "--json", str(file)])
    torch.set_num_threads(threads)
    (record,) = json.loads(file.read_text())["records"]
    assert record["model"] == "tiny" and record["attentions"] == 3
    assert len(record["before"]) == len(record["after"]) == 2
    assert 0 < record["outputs"] < 1e-4 and record["maps"] is None
    assert "| tiny " in capsys.readouterr().out


def test_differences_are_relative_and_infinities_must_be_the_same():
    one = torch.tensor([2.0, -4.0, float("-inf")])
    other = torch.tensor([2.0, -3.0, float("-inf")])
    assert native_attention.relative_difference(one, other) == pytest.approx(0.25)
    assert native_attention.relative_difference(one, one.abs()) == float("inf")
    assert native_attention.largest_difference({"maps": (one,)}, {"maps": (other,)}, ["maps"]) > 0.2
    assert native_attention.largest_difference({}, {}, ["maps"]) is None
