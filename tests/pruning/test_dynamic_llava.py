"""Dynamic-LLaVA's image predictor against modules of torch with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmserve.errors import BadRequest
from mmserve.pruning.dynamic_llava import items, load_predictor
from mmserve.pruning.inner import make_reducer
from tests.pruning.predictors import BLOCKS, HEADS, WIDTH, predictor_weights, write_predictor
from tests.pruning.test_inner import HIDDEN, make_view


class Block(nn.Module):
    """A pre-norm block as torch has it, but for the bias of its products, which the paper's has not."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", norm_first=True, batch_first=True
        ).eval()
        self.layer.load_state_dict(
            {
                "self_attn.in_proj_weight": weights["attn.qkv.weight"],
                "self_attn.in_proj_bias": torch.zeros(3 * WIDTH),
                "self_attn.out_proj.weight": weights["attn.proj.weight"],
                "self_attn.out_proj.bias": weights["attn.proj.bias"],
                **{f"linear{at}.{kind}": weights[f"mlp.fc{at}.{kind}"] for at in (1, 2) for kind in KINDS},
                **{f"norm{at}.{kind}": weights[f"norm{at}.{kind}"] for at in (1, 2) for kind in KINDS},
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made


KINDS = ("weight", "bias")


def sequential(weights: dict[str, Tensor], name: str, *modules: nn.Module) -> nn.Module:
    made = nn.Sequential(*modules)
    made.load_state_dict(
        {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(name)}
    )
    return made


@torch.inference_mode()
def literal_rate(tokens: Tensor) -> Tensor:
    """As the paper has it: an MLP, a transformer, half of the features shared, an MLP, a softmax over two."""
    weights = predictor_weights(HIDDEN)
    down = sequential(weights, "down_mlp", nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.GELU())
    x = down(tokens)[None]
    for at in range(BLOCKS):
        start = f"transformer.{at}."
        x = Block({key.removeprefix(start): w for key, w in weights.items() if key.startswith(start)})(x)
    half = WIDTH // 2
    shared = x[:, :, half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)
    head = sequential(
        weights,
        "output_mlp",
        nn.Linear(WIDTH, half),
        nn.GELU(),
        nn.Linear(half, half // 2),
        nn.GELU(),
        nn.Linear(half // 2, 2),
    )
    kept: Tensor = head(torch.cat([x[:, :, :half], shared], 2)).softmax(-1)[0, :, 0]
    return kept


@pytest.mark.parametrize("prefix", ["", "image_score_predictor.", "model.image_score_predictor."])
def test_a_rating_is_that_of_the_papers_network(tmp_path: Path, prefix: str) -> None:
    predictor = load_predictor(write_predictor(tmp_path / "p.safetensors", HIDDEN, prefix))
    tokens = torch.randn(23, HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        predictor.rate(tokens, HEADS).exp(), literal_rate(tokens), rtol=1e-4, atol=1e-5
    )


def test_the_best_rated_stay(tmp_path: Path) -> None:
    weights = write_predictor(tmp_path / "p.safetensors", HIDDEN)
    view = make_view(20, seed=3)
    rated = literal_rate(view.hidden[:20]).tolist()
    best = sorted(sorted(range(20), key=lambda row: -rated[row])[:7])
    found = make_reducer("dynamic_llava", 0.35, weights=weights, heads=HEADS).reduce(view)
    assert found.rows.tolist() == [*best, *range(20, 26)]
    assert torch.equal(found.hidden, view.hidden[found.rows])


def test_every_item_is_rated_by_itself() -> None:
    is_reducible = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert [rows.tolist() for rows in items(is_reducible)] == [[0, 1, 2], [5, 6], [8]]


def test_what_is_no_predictor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match="Expected weights to be the safetensors file of a predictor, but got ''"
    ):
        make_reducer("dynamic_llava")
    with pytest.raises(BadRequest, match="but got 7"):
        make_reducer("dynamic_llava", weights=7)
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    with pytest.raises(BadRequest, match="to be a safetensors file with a predictor"):
        make_reducer("dynamic_llava", weights=str(text))
    half = tmp_path / "half.safetensors"
    weights = predictor_weights(HIDDEN)
    del weights["output_mlp.2.bias"]
    save_file(weights, half)
    with pytest.raises(BadRequest, match=r"Expected output_mlp\.2\.bias of a predictor in .*half"):
        make_reducer("dynamic_llava", weights=str(half))
    wide = write_predictor(tmp_path / "wide.safetensors", 2 * HIDDEN)
    with pytest.raises(BadRequest, match="weights for hidden states of 12, but got some for 24"):
        make_reducer("dynamic_llava", weights=wide, heads=HEADS).reduce(make_view(9))
    fits = write_predictor(tmp_path / "fits.safetensors", HIDDEN)
    with pytest.raises(BadRequest, match="Expected heads that divide 16, but got 5"):
        make_reducer("dynamic_llava", weights=fits, heads=5).reduce(make_view(9))
