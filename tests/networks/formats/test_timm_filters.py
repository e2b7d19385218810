"""Checkpoints as their authors publish them, in tiny networks of timm: the same vectors as the authors' own."""

import re

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def loaded(tmp_path, state, model):
    torch.save(state, tmp_path / "published.pth")
    found = checkpoints.fit(tmp_path / "published.pth", model, "timm:tiny")
    model.load_state_dict(found.state, strict=False)
    return model.eval(), found.line


def vit(size, **how):
    return VisionTransformer(size, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0, **how)


def test_clip_of_open_clip_and_of_openai(tmp_path):
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    theirs = CLIP(
        24, vision, CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=2, layers=1), quick_gelu=False
    )
    theirs.eval()
    ours = VisionTransformer(
        32, 8, embed_dim=64, depth=2, num_heads=2, num_classes=0, pre_norm=True, norm_layer=torch.nn.LayerNorm
    )
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    ours, line = loaded(tmp_path, {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, ours)
    assert "converted by timm" in line
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x) @ theirs.visual.proj, theirs.visual(x), rtol=1e-4, atol=1e-4)


def test_dinov2_with_registers(tmp_path):
    ours = vit(32, init_values=1e-5, reg_tokens=4, no_embed_class=True)
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    published = dict(state) | {"mask_token": torch.zeros(1, 32), "register_tokens": state["reg_token"]}
    published["pos_embed"] = torch.cat([torch.randn(1, 1, 32), state["pos_embed"]], 1)
    del published["reg_token"]
    found, line = loaded(tmp_path, {"teacher": {f"backbone.{name}": it for name, it in published.items()}}, ours)
    assert "below teacher.backbone converted by timm" in line
    for name, value in found.state_dict().items():
        wanted = state["cls_token"] + published["pos_embed"][:, :1] if name == "cls_token" else state[name]
        torch.testing.assert_close(value, wanted)


def test_dinov3_under_its_own_names(tmp_path):
    ours = Eva(
        32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0, num_reg_tokens=4, init_values=1e-5, qkv_bias=False,
        use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3",
    )  # fmt: skip
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    published = {
        re.sub(r"gamma_([12])", r"ls\1.gamma", name).replace("reg_token", "storage_tokens"): value
        for name, value in state.items()
    }
    published |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(8)}
    published |= {f"blocks.{n}.attn.qkv.bias_mask": torch.ones(96) for n in range(2)}
    published |= {f"blocks.{n}.attn.qkv.bias": torch.zeros(96) for n in range(2)}
    found, line = loaded(tmp_path, published, ours)
    assert "converted by timm" in line
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def test_convnext_of_its_authors(tmp_path):
    ours = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0)
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    published = {}
    for name, value in state.items():
        theirs = re.sub(r"^stem\.", "downsample_layers.0.", name)
        theirs = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", theirs)
        theirs = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", theirs).replace("conv_dw", "dwconv")
        theirs = re.sub(r"mlp\.fc([12])", r"pwconv\1", theirs).replace("head.norm", "norm")
        published[theirs] = value
    found, _ = loaded(tmp_path, {"model": published | {"head.weight": torch.ones(3, 32)}}, ours)
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("size", [16, 48, 64])
def test_position_embeddings_are_resampled_to_any_size(tmp_path, size):
    published = {name: torch.randn_like(value) for name, value in vit(32).state_dict().items()}
    y = torch.arange(4.0).view(4, 1, 1).expand(4, 4, 32).reshape(1, 16, 32)  # a slope down the image
    published["pos_embed"] = torch.cat([torch.full((1, 1, 32), 9.0), y], 1)
    decoder = {"decoder_pos_embed": torch.ones(1, 17, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}  # MAE's
    found, line = loaded(tmp_path, {"model": published | decoder}, vit(size))
    grid = found.pos_embed[0, 1:].reshape(size // 8, size // 8, 32)
    assert "converted by timm" in line
    assert torch.equal(found.pos_embed[0, 0], torch.full((32,), 9.0))
    assert (grid[1:, :, 0] > grid[:-1, :, 0]).all() and torch.allclose(grid[:, :1], grid, atol=1e-5)


def test_what_timm_does_not_know_is_refused_as_before(tmp_path):
    torch.save({name: it for name, it in vit(32).state_dict().items() if "blocks.1" not in name}, tmp_path / "p.pth")
    with pytest.raises(UsageError, match="its trunk is not complete without"):
        checkpoints.fit(tmp_path / "p.pth", vit(32), "timm:tiny")
