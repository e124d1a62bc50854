"""The whole of ViPO on a toy, with the library's pure functions: no pipeline, no config, about 10 seconds.

The policy is a small convolutional flow model on 16x16 "latents" of four channels. The reward likes a disc in the
centre and says one number per sample. The Perceptual Structuring Module reads the first three channels as a picture,
finds where it differs from its border, and so tells the update which positions matter. Run it:

    python examples/minimal.py [--level sample]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from vipo import PerceptualStructuring, group_advantages, pixel_advantages, policy_loss
from vipo.kernels import dance_grpo, gaussian_log_prob

GROUPS, GROUP_SIZE, STEPS, ETA, SIZE = 4, 8, 6, 0.7, 16
SIGMAS = torch.linspace(1, 0, STEPS + 1).tolist()


class Flow(nn.Module):
    """Velocity field v(x, sigma) of a toy generator; a position channel lets it treat places apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(7, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 4, 1)
        )
        axis = torch.linspace(-1, 1, SIZE)
        self.place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        extra = torch.cat([self.place, torch.full((1, SIZE, SIZE), sigma)]).expand(len(x), -1, -1, -1)
        return x + self.layers(torch.cat([x, extra], 1))  # v = noise - x0 with x0 near 0: a blank picture


def step(flow: Flow, x: Tensor, k: int):
    """The one step function: it samples in the rollout and re-scores in training, so the two cannot drift apart."""
    eta = ETA if k < STEPS - 1 else 0.0  # the last step's noise would reach the picture, but no later step
    return dance_grpo(x, flow(x, SIGMAS[k]), sigma=SIGMAS[k], sigma_next=SIGMAS[k + 1], eta=eta, sigma_max=SIGMAS[1])


@torch.no_grad()
def rollout(flow: Flow, generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """[1] Sample groups; return (x_k, x_{k+1}, log-probs) of every step."""
    start = torch.randn(GROUPS, 1, 4, SIZE, SIZE, generator=generator)
    x = start.expand(-1, GROUP_SIZE, -1, -1, -1).flatten(0, 1)  # the samples of a group start from one noise
    records = []
    for k in range(STEPS):
        gaussian = step(flow, x, k)
        following = gaussian.mean + gaussian.std * torch.randn(x.shape, generator=generator)
        records.append((x, following, gaussian_log_prob(following, gaussian) if gaussian.std > 0 else None))
        x = following
    return records


def decode(x: Tensor) -> Tensor:
    """[2] The toy's VAE: three of the four channels as a picture, (N, F, 3, Y, X) in [0, 1]."""
    return torch.sigmoid(2 * x[:, None, :3])


def reward(frames: Tensor) -> Tensor:
    """[3] One number per sample: the disc in the centre should be bright, the rest grey."""
    axis = torch.linspace(-1, 1, SIZE)
    disc = (axis[:, None].square() + axis.square() < 0.25).float()
    return -(frames[:, 0] - 0.5 - 0.4 * disc).square().mean((1, 2, 3))


def features(frames: Tensor) -> Tensor:
    """The toy's frozen backbone: smoothed colours of 2x2 patches, (N, F, h, w, D)."""
    return nn.functional.avg_pool3d(frames.transpose(1, 2), (1, 2, 2)).movedim(1, -1)


def grid(values: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, T, H, W)."""
    return values[:, :, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=("position", "sample"), default="position", help="ViPO or scalar GRPO")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    flow = Flow()
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    psm = PerceptualStructuring(features, orientation="border_energy", normalisation="mean")
    history = []
    for iteration in range(options.iterations):
        records = rollout(flow, generator)
        frames = decode(records[-1][1])
        rewards = reward(frames)
        advantages = group_advantages(rewards, GROUP_SIZE)  # ViPO Eq. 1
        if options.level == "position":
            maps = psm(frames, latent_shape=(1, SIZE, SIZE))  # ViPO Eq. 2
        else:
            maps = torch.ones(len(frames), 1, SIZE, SIZE)
        spread = pixel_advantages(advantages, maps)  # ViPO Eq. 3
        optimizer.zero_grad()
        for k, (x, following, old) in enumerate(records):
            if old is None:
                continue
            log_probs = gaussian_log_prob(following, step(flow, x, k))
            loss, stats = policy_loss(grid(log_probs), grid(old), spread, clip_range=0.1, level=options.level)  # Eq. 4
            (loss / (STEPS - 1)).backward()
        optimizer.step()
        history.append(rewards.mean().item())
        if iteration % 10 == 0 or iteration == options.iterations - 1:
            print(f"iteration {iteration:3d}  reward {history[-1]:.4f}  clipped {stats.clip_fraction:.0%}")
    print(f"reward {sum(history[:5]) / 5:.4f} -> {sum(history[-5:]) / 5:.4f}")


if __name__ == "__main__":
    main()
