"""Small random encoders by name: what `synth.write` writes besides decoders, each with the changes that matter."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.synth import Experts, Recipe

BERT_NORMS = ("attn_output_norm", "layer_output_norm")


@dataclass(frozen=True)
class EncoderRecipe(Recipe):
    """A recipe of an encoder; `buckets` makes it a T5."""

    arch: str = "bert"
    kv_heads: int = 4
    norm: str = "layer"
    norms: tuple[str, ...] = BERT_NORMS
    norm_bias: bool = True
    output_norm: bool = False
    embedding_norm: bool = True
    token_types: bool = True
    norm_2: bool = False
    down_bias: bool = False
    bare_first: bool = False  # no attn_norm in the first block
    buckets: int = 0
    bias_everywhere: bool = False  # T5: each block has biases of its own
    decoder: bool = False  # T5: as many blocks of a decoder
    activation: str = "gelu"

    def tensors(self, vocab: int, context: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        found = super().tensors(vocab, context)
        if self.token_types:
            found["token_types.weight"] = (2, self.d_model)
        for i in range(self.layers):
            if self.down_bias:
                found[f"blk.{i}.ffn_down.bias"] = (self.d_model,)
            if self.norm_2:
                found |= dict.fromkeys((f"blk.{i}.attn_norm_2.weight", f"blk.{i}.attn_norm_2.bias"), (self.d_model,))
        if self.bare_first:
            del found["blk.0.attn_norm.weight"]
        return self._t5(found) if self.buckets else found

    def _t5(self, found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        renamed = {
            ("enc." + name.replace("attn_output", "attn_o") if name != "token_embd.weight" else name): shape
            for name, shape in found.items()
        }
        for i in range(self.layers if self.bias_everywhere else 1):
            renamed[f"enc.blk.{i}.attn_rel_b.weight"] = (self.buckets, self.heads)
        if self.decoder:
            ours = {name.replace("enc.", "dec."): shape for name, shape in renamed.items() if name.startswith("enc.")}
            crossing = {name.replace("attn_", "cross_attn_"): shape for name, shape in ours.items() if "attn_" in name}
            renamed |= ours | {name: shape for name, shape in crossing.items() if "rel_b" not in name}
        return renamed


_BIASES = {"qkv_bias": "split", "out_bias": True, "mlp_bias": True}
_T5 = EncoderRecipe(
    "t5encoder",
    norm="rms",
    norm_bias=False,
    norms=("attn_norm", "ffn_norm"),
    output_norm=True,
    embedding_norm=False,
    token_types=False,
    mlp="plain",
    activation="relu",
    buckets=32,
    keys={"attention.relative_buckets_count": 32},
)
_JINA = EncoderRecipe("jina-bert-v2", qkv_bias="split", out_bias=True, down_bias=True)
_MODERN_GELU = EncoderRecipe(
    "modern-bert",
    norms=("attn_norm", "ffn_norm"),
    norm_bias=False,
    output_norm=True,
    token_types=False,
    fused_qkv=True,
    mlp="fused",
    bare_first=True,
    layers=4,
    keys={"attention.sliding_window": 16, "rope.freq_base": 160000.0, "rope.freq_base_swa": 10000.0},
)
_MODERN = _MODERN_GELU.but({"hidden_activation": "silu"}, activation="silu")
_NOMIC = EncoderRecipe("nomic-bert", activation="silu", fused_qkv=True, keys={"rope.freq_base": 1000.0})
_NOMIC_MOE = EncoderRecipe(
    "nomic-bert-moe",
    **{**_BIASES, "qkv_bias": "fused"},
    fused_qkv=True,
    mlp="plain",
    layers=4,
    experts=Experts(every=2),
    keys={"rope.freq_base": 1000.0, "moe_every_n_layers": 2},
)
_BERT = EncoderRecipe("bert", **_BIASES, mlp="plain", positions=True)

# By name: the file, and one whose answer it must differ from, where metadata alone sets them apart.
ENCODERS: dict[str, tuple[EncoderRecipe, EncoderRecipe | None]] = {
    "bert": (_BERT, None),
    "bert: fused": (_BERT.but(fused_qkv=True, qkv_bias="fused"), None),
    "bert: no token types": (_BERT.but(token_types=False), None),
    "bert: 6 heads by 3": (_BERT.but(heads=6, kv_heads=3, d_model=96), None),
    "bert: epsilon": (_BERT.but({"attention.layer_norm_epsilon": 1.0}), _BERT),
    "nomic-bert": (_NOMIC, None),
    "nomic-bert: freq_base": (_NOMIC.but({"rope.freq_base": 30.0}), _NOMIC),
    "nomic-bert: biases": (_NOMIC.but(qkv_bias="fused", out_bias=True), None),
    "nomic-bert-moe": (_NOMIC_MOE, None),
    "nomic-bert-moe: one used": (_NOMIC_MOE.but({"expert_used_count": 1}), _NOMIC_MOE),
    "nomic-bert-moe: every third, fewer biases": (
        _NOMIC_MOE.but({"moe_every_n_layers": 3}, experts=Experts(every=3, place=1), out_bias=False, mlp_bias=False),
        None,
    ),
    "nomic-bert-moe: no experts": (_NOMIC_MOE.but({"moe_every_n_layers": 0}, experts=None, layers=2), None),
    "jina-bert-v2": (_JINA, None),
    "jina-bert-v2: fused gate": (_JINA.but(mlp="fused"), None),
    "jina-bert-v2: code": (_JINA.but(qk_norm="whole", norm_2=True), None),
    "jina-bert-v2: 6 heads": (_JINA.but(heads=6, kv_heads=6, d_model=96), None),
    "modern-bert: gelu": (_MODERN_GELU, None),
    "modern-bert": (_MODERN, None),
    "modern-bert: norm in the first block": (_MODERN.but(bare_first=False), None),
    "modern-bert: window": (_MODERN.but({"attention.sliding_window": 9}), _MODERN),
    "modern-bert: no window": (_MODERN.but({"attention.sliding_window": 0}), _MODERN),
    "modern-bert: pattern": (_MODERN.but({"attention.sliding_window_pattern": 2}), _MODERN),
    "modern-bert: pattern array": (
        _MODERN.but({"attention.sliding_window_pattern": [True, False, True, True]}),
        _MODERN,
    ),
    "modern-bert: sliding base": (_MODERN.but({"rope.freq_base_swa": 100.0}), _MODERN),
    "t5encoder": (_T5, None),
    "t5": (_T5.but({"decoder_start_token_id": 0, "decoder_block_count": 2}, arch="t5", decoder=True), None),
    "t5encoder: gated": (_T5.but(mlp="gated", activation="gelu"), None),
    "t5encoder: biases in each block": (_T5.but(bias_everywhere=True), None),
    "t5encoder: head_dim": (_T5.but(head_dim=24), None),
    "t5encoder: 12 buckets": (_T5.but({"attention.relative_buckets_count": 12}, buckets=12), None),
}
