"""Speed of DrQ-v2's update in PyTorch, with the networks of ours; run by path with the peers' Python, writes one JSON file."""

import argparse
import copy
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZE, CHANNELS, PAD = 84, 9, 4
FEATURES, HIDDEN, ACTIONS = 50, 1024, 6
STD, CLIP, DISCOUNT, TAU, LEARNING_RATE = 0.5, 0.3, 0.97, 0.01, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--updates", type=int, default=10, help="gradient steps that are timed")
    parser.add_argument("--warm-updates", type=int, default=2, help="gradient steps before")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and convolutions")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    # Here, so that this module can be imported and checked where the peers are not installed.
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    def trunk() -> Any:
        return nn.Sequential(nn.Linear(32 * 35 * 35, FEATURES), nn.LayerNorm(FEATURES), nn.Tanh())

    def head(inputs: int, outputs: int) -> Any:
        layers = [nn.Linear(inputs, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))

    class Critic(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = trunk(), nn.ModuleList(head(FEATURES + ACTIONS, 1) for _ in range(2))

        def forward(self, features: Any, action: Any) -> Any:
            x = torch.cat([self.trunk(features), action], dim=1)
            return torch.stack([each(x).squeeze(1) for each in self.heads])

    convolutions: list[Any] = []
    for inputs, stride in ((CHANNELS, 2), (32, 1), (32, 1), (32, 1)):
        convolutions += [nn.Conv2d(inputs, 32, 3, stride=stride), nn.ReLU(inplace=True)]
    encoder = nn.Sequential(*convolutions, nn.Flatten()).to(memory_format=layout)
    actor = nn.Sequential(trunk(), head(FEATURES, ACTIONS), nn.Tanh())
    critic = Critic()
    target = copy.deepcopy(critic)
    optimizers = [torch.optim.Adam(each.parameters(), lr=LEARNING_RATE) for each in (encoder, critic, actor)]

    def shifted(images: Any) -> Any:
        """An integer crop out of the image padded by its edge, as float in [-0.5, 0.5]."""
        padded = functional.pad(images.float(), (PAD,) * 4, mode="replicate")
        offset = torch.randint(0, 2 * PAD + 1, (len(images), 2, 1))
        rows, columns = (offset[:, axis] + torch.arange(SIZE) for axis in range(2))
        index = torch.arange(len(images))
        crop = padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return (crop.permute(0, 3, 1, 2) / 255 - 0.5).contiguous(memory_format=layout)

    def noisy(mean: Any) -> Any:
        action = mean + (STD * torch.randn_like(mean)).clamp(-CLIP, CLIP)
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    shape = (args.batch_size, CHANNELS, SIZE, SIZE)
    images, next_images = (torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2))
    taken, reward = torch.rand(args.batch_size, ACTIONS) * 2 - 1, torch.randn(args.batch_size)

    def update() -> None:
        features = encoder(shifted(images))
        with torch.no_grad():
            next_features = encoder(shifted(next_images))
            value = target(next_features, noisy(actor(next_features))).min(dim=0).values
            goal = reward + DISCOUNT * value
        loss = ((critic(features, taken) - goal) ** 2).mean(dim=1).sum()
        for optimizer in optimizers[:2]:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers[:2]:
            optimizer.step()
        features = features.detach()
        loss = -critic(features, noisy(actor(features))).min(dim=0).values.mean()
        optimizers[2].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[2].step()
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), critic.parameters(), strict=True):
                ours.lerp_(theirs, TAU)

    for _ in range(args.warm_updates):
        update()
    started = time.monotonic()
    for _ in range(args.updates):
        update()
    seconds = (time.monotonic() - started) / args.updates
    args.out.write_text(json.dumps({"peer": "torch", "version": version("torch"), "seconds_per_update": seconds}))


if __name__ == "__main__":
    main()
