"""vipo.psm.PerceptualStructuring: the whole map against scikit-learn and SciPy, and everything that must not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

import vipo.psm
from vipo.psm import ORIENTATIONS, PerceptualStructuring
from vipo.psm.allocation import COMBINATIONS, flicker, map_statistics
from vipo.psm.pca import PrincipalComponents, principal_components


def pooled(width: int) -> Callable[[Tensor], Tensor]:
    """A backbone without position embeddings: colours of 4 x 4 patches through a fixed random layer to D = `width`."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, width, generator=generator), torch.randn(width, width, generator=generator)

    def backbone(frames: Tensor) -> Tensor:
        colours = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 4).unflatten(0, frames.shape[:2]).movedim(2, -1)
        return torch.tanh(2 * colours @ weights[0].to(frames)) @ weights[1].to(frames)

    return backbone


def scenes(samples: int, frames: int = 1, seed: int = 0, height: int = 48, width: int = 40) -> Tensor:
    """A moving square of two colours on a shaded ground, (N, F, 3, Y, X) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shade = torch.linspace(0, 0.3, width)
    pictures = torch.empty(samples, frames, 3, height, width)
    for sample in range(samples):
        ground, left, right = torch.rand(3, 3, 1, 1, generator=generator) * 0.5
        for frame in range(frames):
            picture = (ground + shade).expand(3, height, width).clone()
            row, column = 14 + sample, 10 + frame
            picture[:, row : row + 16, column : column + 10] = left + 0.5
            picture[:, row : row + 16, column + 10 : column + 16] = right
            pictures[sample, frame] = picture
    noise = 0.02 * torch.rand(pictures.shape, generator=generator)
    return (pictures + noise).clamp(0, 1)


def reference(features: np.ndarray, orientation: str, scope: str, sigma: float) -> np.ndarray:
    """One sample's S in float64 by scikit-learn and SciPy: features (F, h, w, D) -> (F, h, w)."""
    if scope == "frame":
        return np.concatenate([reference(frame[None], orientation, "sample", sigma) for frame in features])
    frames, height, width, channels = features.shape
    pca = PCA(3, svd_solver="full")
    z = pca.fit_transform(features.reshape(-1, channels))
    z = (z / z.std(0)).reshape(frames, height, width, 3)
    ring = np.ones((height, width), bool)
    ring[1:-1, 1:-1] = False
    border = z[:, ring].mean(1)  # (F, 3)
    if orientation == "border_energy":
        maps = (z - border[:, None, None]) ** 2
    else:
        z = -z if orientation == "library" else z * -np.sign(border.mean(0))
        low, high = z.min((0, 1, 2)), z.max((0, 1, 2))
        maps = (z - low) / (high - low)
    return gaussian_filter(maps @ pca.explained_variance_ratio_, sigma, mode="reflect", truncate=4, axes=(1, 2))


@pytest.mark.parametrize("solver", ["subspace", "exact"])
@pytest.mark.parametrize("orientation", ["border_energy", "border", "library"])
@pytest.mark.parametrize("scope", ["sample", "frame"])
def test_the_whole_map_equals_scikit_learn_and_scipy(solver: str, orientation: str, scope: str) -> None:
    backbone = pooled(8)
    frames = scenes(3, frames=5)
    psm = PerceptualStructuring(backbone, orientation=orientation, pca_scope=scope, solver=solver, smoothing=0.8)
    maps = psm(frames, (2, 12, 10), temporal_compression=4)  # the latent grid is the patch grid: no resizing
    assert maps.shape == (3, 2, 12, 10) and maps.dtype == torch.float32
    for sample in range(3):
        structure = reference(backbone(frames[sample : sample + 1].double())[0].numpy(), orientation, scope, 0.8)
        expected = np.stack([structure[0], structure[1:].mean(0)])
        # PCA in float32: see test_pca_in_float32_is_close_to_float64.
        np.testing.assert_allclose(maps[sample], expected / expected.mean(), rtol=0, atol=1e-4)


def test_images_resized_to_the_latent_grid() -> None:
    backbone = pooled(8)
    frames = scenes(2)
    maps = PerceptualStructuring(backbone, smoothing=0)(frames, (1, 6, 5))
    for sample in range(2):
        structure = reference(backbone(frames[sample : sample + 1].double())[0].numpy(), "border_energy", "sample", 0)
        weights = np.zeros((6, 12))  # halving: a triangle of reach 2 around 2 i + 1/2, cut at the edges
        for i in range(6):
            for source, weight in zip(range(2 * i - 1, 2 * i + 3), (0.25, 0.75, 0.75, 0.25), strict=True):
                if 0 <= source < 12:
                    weights[i, source] = weight
        weights /= weights.sum(1, keepdims=True)
        columns = weights[:5, :10] / weights[:5, :10].sum(1, keepdims=True)
        expected = weights @ structure @ columns.T
        np.testing.assert_allclose(maps[sample], expected / expected.mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("scope", ["sample", "frame"])
def test_a_sample_does_not_depend_on_its_batch(orientation: str, scope: str) -> None:
    psm = PerceptualStructuring(pooled(8), orientation=orientation, pca_scope=scope)
    frames = scenes(4, frames=3, seed=1)
    together = psm(frames, (3, 8, 8))
    for sample in range(4):
        # Matrix products of another batch size may round differently.
        torch.testing.assert_close(psm(frames[sample : sample + 1], (3, 8, 8))[0], together[sample], rtol=0, atol=1e-4)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_sign_flips_of_the_solver_leave_the_map(orientation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    psm = PerceptualStructuring(pooled(8), orientation=orientation)
    frames = scenes(2, seed=2)
    expected = psm(frames, (1, 8, 8))

    def flipping(features: Tensor, components: int, solver: str) -> PrincipalComponents:
        got = principal_components(features, components, solver)
        signs = torch.tensor([-1.0, 1.0, -1.0])
        return got._replace(projections=got.projections * signs, loadings=got.loadings * signs[None, :, None])

    monkeypatch.setattr(vipo.psm, "principal_components", flipping)
    assert torch.equal(psm(frames, (1, 8, 8)), expected)


@pytest.mark.parametrize("orientation", [rule for rule in ORIENTATIONS if rule != "library"])
def test_the_subject_weighs_more_than_its_background(orientation: str) -> None:
    """One colour on a plain ground; on `scenes` (shaded, two colours) skewness follows the shade instead."""
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(6, 1, 3, 1, 1, generator=generator).expand(6, 1, 3, 48, 40).clone()
    mask = torch.zeros(6, 48, 40, dtype=torch.bool)
    for sample in range(6):
        row = 10 + 2 * sample
        mask[sample, row : row + 16, 10:26] = True
        frames[sample, :, :, row : row + 16, 10:26] = torch.rand(3, 1, 1, generator=generator)
    frames = (frames + 0.02 * torch.rand(frames.shape, generator=generator)).clamp(0, 1)
    maps = PerceptualStructuring(pooled(16), orientation=orientation)(frames, (1, 48, 40))[:, 0]
    for sample in range(6):
        assert maps[sample][mask[sample]].mean() > 2 * maps[sample][~mask[sample]].mean(), sample


def test_defaults_give_nonnegative_maps_of_mean_one_without_gradient() -> None:
    frames = scenes(3, frames=9).requires_grad_()
    maps = PerceptualStructuring(pooled(8))(frames, (3, 16, 14), temporal_compression=4)
    assert maps.shape == (3, 3, 16, 14) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.min() >= 0 and maps.max() > 1.5
    torch.testing.assert_close(maps.double().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert PerceptualStructuring(pooled(8), floor=0.25)(frames, (9, 8, 8)).min() >= 0.25
    spans = PerceptualStructuring(pooled(8), normalisation="minmax")(frames, (9, 8, 8))
    assert spans.amin((1, 2, 3)).tolist() == [0, 0, 0] and spans.amax((1, 2, 3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("normalisation", ["mean", "minmax"])
def test_an_image_without_structure_is_weighed_evenly(orientation: str, normalisation: str) -> None:
    psm = PerceptualStructuring(pooled(8), orientation=orientation, normalisation=normalisation)
    frames = scenes(2)
    frames[1] = torch.tensor([0.2, 0.9, 0.4]).view(3, 1, 1)
    maps = psm(frames, (1, 8, 8))
    assert torch.equal(maps[1], torch.ones(1, 8, 8))
    assert maps[0].std() > 0.05


def test_a_blank_sample_has_a_map_of_ones_whatever_its_position_embeddings_say() -> None:
    frames = scenes(3, frames=2, height=48, width=48)
    frames[1] = torch.tensor([0.2, 0.9, 0.4]).view(3, 1, 1)
    psm = PerceptualStructuring.from_pretrained("nano")
    alone = psm(frames[[0, 2]], (2, 12, 12))
    maps = psm(frames, (2, 12, 12))
    assert torch.equal(maps[1], torch.ones(2, 12, 12))
    assert map_statistics(maps)["constant"] == 1
    torch.testing.assert_close(maps[[0, 2]], alone, rtol=0, atol=1e-4)
    frames[1, 1, :, 20:28, 20:28] = 0.5  # something appears in the second frame
    assert psm(frames, (2, 12, 12))[1].std() > 0.1


def test_one_basis_per_clip_keeps_a_component_through_time() -> None:
    """A scene that turned faint keeps its faint map; a basis per frame blows each frame up to the same strength."""
    frames = scenes(1).repeat(1, 2, 1, 1, 1)
    frames[:, 1] = (frames[:, 1] * 0.2).clamp(0, 1)  # the same scene, fainter
    sample = PerceptualStructuring(pooled(8))(frames, (2, 8, 8))[0].mean((1, 2))
    frame = PerceptualStructuring(pooled(8), pca_scope="frame")(frames, (2, 8, 8))[0].mean((1, 2))
    assert sample[0] > 2 * sample[1] and 0.8 < frame[0] / frame[1] < 1.25


def test_maps_are_float32_whatever_the_features_are() -> None:
    frames = scenes(2)
    expected = PerceptualStructuring(pooled(8))(frames, (1, 8, 8))
    for dtype, tolerance in {torch.float64: 1e-4, torch.bfloat16: 0.2}.items():
        psm = PerceptualStructuring(lambda pictures, dtype=dtype: pooled(8)(pictures).to(dtype))
        maps = psm(frames, (1, 8, 8))
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected, rtol=0, atol=tolerance)


def test_the_backbone_builds_no_graph() -> None:
    graphs = []

    def recording(frames: Tensor) -> Tensor:
        graphs.append((frames * torch.ones(1, requires_grad=True)).requires_grad)
        return pooled(8)(frames)

    PerceptualStructuring(recording)(scenes(1), (1, 4, 4))
    assert graphs == [False]


def test_options_reach_the_map() -> None:
    frames = scenes(1)

    def maps(**options: object) -> Tensor:
        return PerceptualStructuring(pooled(8), **options)(frames, (1, 8, 8))  # type: ignore[arg-type]

    default = maps()
    for option, value in {"components": 1, "weighting": "mean", "smoothing": 0.3, "orientation": "energy"}.items():
        assert not torch.allclose(maps(**{option: value}), default, atol=1e-3), option
    torch.testing.assert_close(maps(weighting="first"), maps(components=1), rtol=0, atol=1e-4)


def test_autocast_of_the_caller_does_not_round_the_maps() -> None:
    features = pooled(8)(scenes(2))
    psm = PerceptualStructuring(lambda frames: features)
    expected = psm(scenes(2), (1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(psm(scenes(2), (1, 8, 8)), expected)


def test_from_pretrained_passes_every_option_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    options = dict(components=2, orientation="border", weighting="mean", smoothing=0.5, normalisation="mean")
    options |= dict(floor=0.1, pca_scope="frame", solver="exact")
    psm = PerceptualStructuring.from_pretrained(
        tmp_path, **options, image_size=24, chunk=1, device="cpu", dtype=torch.bfloat16
    )
    assert {name: getattr(psm, name) for name in options} == options
    backbone = psm.backbone
    assert (backbone.image_size, backbone.chunk, backbone.dtype) == (24, 1, torch.bfloat16)
    maps = psm(scenes(2, frames=3, height=32, width=32), (3, 4, 4))
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.ones(2), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------------- video


@pytest.mark.parametrize("compression", [1, 2, 4, 8])
@pytest.mark.parametrize("first_frame_alone", [True, False])
def test_every_latent_frame_is_the_mean_of_its_own_pixel_frames(compression: int, first_frame_alone: bool) -> None:
    alone = int(first_frame_alone)
    frames = scenes(2, frames=alone + 2 * compression)
    psm = PerceptualStructuring(pooled(8))
    per_frame = psm.frame_maps(psm.features(frames))
    maps = psm(frames, (2 + alone, 12, 10), compression, first_frame_alone=first_frame_alone)
    groups = [[0]] * alone + [[alone + j * compression + i for i in range(compression)] for j in range(2)]
    expected = torch.stack([per_frame[:, group].mean(1) for group in groups], 1)
    torch.testing.assert_close(maps, expected / expected.mean((1, 2, 3), keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("scope", ["sample", "frame"])
@pytest.mark.parametrize("motion", ["none", "difference", "flow"])
def test_a_static_clip_does_not_flicker(orientation: str, scope: str, motion: str) -> None:
    still = scenes(2)
    psm = PerceptualStructuring(pooled(8), orientation=orientation, pca_scope=scope, motion=motion)
    maps = psm(still.expand(-1, 9, -1, -1, -1), (3, 12, 10), 4)
    assert flicker(maps).max() < 1e-4  # of a mean of 1
    torch.testing.assert_close(maps[:, :1], psm(still, (1, 12, 10)), rtol=0, atol=2e-3)  # and it is the image's map


def test_a_basis_per_frame_flickers_where_one_per_clip_does_not() -> None:
    """Two components of nearly one variance change places between frames; energy does not see it, a sign rule does."""
    generator = torch.Generator().manual_seed(4)
    frames = scenes(3, frames=6) + 0.03 * torch.randn(3, 6, 3, 48, 40, generator=generator)

    def worst(**options: str) -> float:
        psm = PerceptualStructuring(pooled(8), **options)  # type: ignore[arg-type]
        return float(flicker(psm(frames.clamp(0, 1), (6, 12, 10))).max())

    assert worst(pca_scope="sample", orientation="library") < 0.9 * worst(pca_scope="frame", orientation="library")


@pytest.mark.parametrize("motion", ["difference", "flow"])
def test_motion_moves_the_weight_to_what_moves(motion: str) -> None:
    """Two equal squares, one of which moves: the perceptual map sees two subjects, the motion map one."""
    frames = torch.full((1, 5, 3, 48, 96), 0.2)
    square = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(5)) * 0.5 + 0.5
    for f in range(5):
        frames[0, f, :, 18:30, 18:30] = square
        frames[0, f, :, 18 + f : 30 + f, 66:78] = square
    plain = PerceptualStructuring(pooled(8))(frames, (5, 12, 24))
    maps = {
        method: PerceptualStructuring(pooled(8), motion=motion, combine=method)(frames, (5, 12, 24))
        for method in ("product", "mean", "power")
    }

    def share(values: Tensor) -> float:
        return float(values[..., 12:].sum() / values.sum())

    assert 0.45 < share(plain) < 0.55
    assert all(share(values) > 0.65 for values in maps.values()), {k: share(v) for k, v in maps.items()}
    for values in maps.values():
        torch.testing.assert_close(values.mean((1, 2, 3)), torch.ones(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("motion", ["difference", "flow"])
def test_what_does_not_move_keeps_its_map(motion: str, combine: str) -> None:
    moving = scenes(1, frames=5)
    frames = torch.cat([moving, moving[:, :1].expand(-1, 5, -1, -1, -1)])
    plain = PerceptualStructuring(pooled(8))(frames, (5, 12, 10))
    maps = PerceptualStructuring(pooled(8), motion=motion, combine=combine)(frames, (5, 12, 10))
    torch.testing.assert_close(maps[1], plain[1], rtol=0, atol=1e-5)
    assert not torch.allclose(maps[0], plain[0], atol=0.1)
    image = PerceptualStructuring(pooled(8), motion=motion, combine=combine)(frames[:, :1], (1, 12, 10))
    torch.testing.assert_close(image, PerceptualStructuring(pooled(8))(frames[:, :1], (1, 12, 10)), rtol=0, atol=1e-5)


def test_features_can_be_used_again() -> None:
    frames = scenes(2, frames=5)
    for options in ({}, {"motion": "flow"}, {"orientation": "skewness", "temperature": 0.5}):
        psm = PerceptualStructuring(pooled(8), **options)  # type: ignore[arg-type]
        again = psm.allocate(psm.features(frames), (2, 6, 5), 4, frames=frames)
        assert torch.equal(again, psm(frames, (2, 6, 5), 4))
    with pytest.raises(ValueError, match="pass them, got None"):
        PerceptualStructuring(pooled(8), motion="flow").allocate(pooled(8)(frames), (2, 6, 5), 4)


def test_any_module_is_a_backbone() -> None:
    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, frames: Tensor) -> Tensor:
            return self.convolution(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).movedim(2, -1)

    torch.manual_seed(0)
    maps = PerceptualStructuring(Patches())(scenes(2, frames=3), (3, 6, 5))
    assert maps.shape == (2, 3, 6, 5) and not maps.requires_grad and maps.std() > 0.1


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orientation": "bordr"}, "did you mean 'border'"),
        ({"weighting": "variances"}, "did you mean 'variance'"),
        ({"normalisation": "means"}, "did you mean 'mean'"),
        ({"pca_scope": "samples"}, "did you mean 'sample'"),
        ({"solver": "exat"}, "did you mean 'exact'"),
        ({"components": 0}, "components: expected at least 1"),
        ({"smoothing": -1.0}, "sigma >= 0"),
        ({"floor": 1.0}, "0 <= floor < 1"),
        ({"floor": 0.1, "normalisation": "minmax"}, 'need normalisation "mean"'),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"motion": "flows"}, "did you mean 'flow'"),
        ({"combine": "products"}, "did you mean 'product'"),
        ({"motion_weight": 1.5}, "0 <= weight <= 1"),
    ],
)
def test_options_are_checked_before_anything_runs(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualStructuring(pooled(8), **options)  # type: ignore[arg-type]


def poisoned(value: float) -> Tensor:
    frames = scenes(2)
    frames[1, 0, 2, 5, 5] = value
    return frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (scenes(1)[0], "wrong number of dimensions"),
        (torch.rand(1, 1, 4, 8, 8), "expected shape"),
        (torch.rand(0, 1, 3, 8, 8), "at least one pixel"),
        (torch.rand(1, 1, 3, 0, 8), "at least one pixel"),
        (torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), "divide uint8 frames by 255"),
        (poisoned(1.01), "max 1.01"),
        (poisoned(-0.01), "min -0.01"),
        (poisoned(float("nan")), "got min nan"),
        (poisoned(float("inf")), "max inf"),
        (scenes(1, frames=2), "2 pixel frames do not decode from T = 1"),
    ],
)
def test_wrong_frames_are_refused(frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualStructuring(pooled(8))(frames, (1, 4, 4))


def test_the_tolerance_of_the_range_is_a_thousandth() -> None:
    for value in (1.0009, -0.0009):
        assert torch.isfinite(PerceptualStructuring(pooled(8))(poisoned(value), (1, 4, 4))).all()


@pytest.mark.parametrize("latent_shape", [(0, 4, 4), (1, 0, 4), (4, 4)])
def test_wrong_latent_shapes_are_refused(latent_shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected \(T, H, W\)"):
        PerceptualStructuring(pooled(8))(scenes(1), latent_shape)


def test_time_is_checked_before_the_backbone_runs() -> None:
    def never(frames: Tensor) -> Tensor:
        raise AssertionError("the backbone ran")

    with pytest.raises(ValueError, match="expected F = .* = 9; pass"):
        PerceptualStructuring(never)(scenes(1, frames=5), (3, 4, 4), temporal_compression=4)


def test_a_failing_backbone_stops_the_run_with_its_own_reason() -> None:
    def failing(frames: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert\nand much more")

    with pytest.raises(RuntimeError, match=r"failed on frames of shape \(2, 1, 3, 48, 40\): .* assert$") as caught:
        PerceptualStructuring(failing)(scenes(2), (1, 4, 4))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20])
def test_features_that_are_not_finite_stop_the_run(value: float) -> None:
    def broken(frames: Tensor) -> Tensor:
        features = pooled(8)(frames)
        features[-1, 0, 3, 3, 3] = value
        return features

    with pytest.raises(RuntimeError, match="features are not finite"):
        PerceptualStructuring(broken)(scenes(2), (1, 4, 4))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda frames: pooled(8)(frames)[:1], "N = 2"),
        (lambda frames: pooled(8)(frames).flatten(2, 3), "wrong number of dimensions"),
        (lambda frames: pooled(8)(frames)[:, :, :0], "at least one value"),
        (lambda frames: (pooled(8)(frames),), "expected a tensor, got tuple"),
        (lambda frames: pooled(2)(frames), r"min\(P, D\) = 2"),
    ],
)
def test_features_of_the_wrong_shape_are_refused(backbone: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualStructuring(backbone)(scenes(2), (1, 4, 4))
