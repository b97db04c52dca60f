"""Metadata that nothing reads is reported, or refused where it would change results."""

import logging

import gguf
import pytest

from oxjax.errors import ModelError
from oxjax.gguf import GGUFFile
from oxjax.models.load import load_config
from tests.helpers.data import data_files


def write(path, **extra):
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
    for key, value in {**numbers, "attention.head_count": 4, "vocab_size": 40, **extra}.items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config(path):
    with GGUFFile.open(path) as file:
        return load_config(file)


def test_a_key_that_nothing_reads_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "oxjax"):
        config(write(tmp_path / "m.gguf", **{"attention.sliding_window": 8, "pooling_type": 0, "expert_count": 0}))
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "metadata without effect: llama.attention.sliding_window"
    ]


@pytest.mark.parametrize(
    "extra,message",
    [
        ({"attention.causal": False}, "attention.causal: found False, but llama is only supported with True"),
        ({"attention.key_length_swa": 8}, "key_length_swa: found 8, .* with 16"),
        ({"rope.dimension_count_swa": 8}, "dimension_count_swa: found 8, .* with 16"),
        ({"nextn_predict_layers": 2}, "nextn_predict_layers: leaves 0 of 2 blocks"),
    ],
)
def test_a_key_that_would_change_results_is_refused(tmp_path, extra, message):
    with pytest.raises(ModelError, match=message):
        config(write(tmp_path / "m.gguf", **extra))


def test_the_same_keys_pass_where_they_change_nothing(tmp_path, caplog):
    neutral = {"attention.causal": True, "attention.key_length_swa": 16, "rope.dimension_count_swa": 16}
    with caplog.at_level(logging.WARNING, "oxjax"):
        config(write(tmp_path / "m.gguf", **neutral))
    assert not caplog.records


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path):
    assert len(config(write(tmp_path / "m.gguf", nextn_predict_layers=1)).layers) == 1


@pytest.mark.parametrize("path", data_files("archs/*.gguf"))
def test_every_key_of_the_test_models_is_known(data, path, caplog):
    with caplog.at_level(logging.WARNING, "oxjax"):
        config(path)
    assert not [r.getMessage() for r in caplog.records]
