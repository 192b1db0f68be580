"""The base session: a backbone without pre-trained weights learns from its first classes, and is frozen for ever after.

Features must serve classes nobody has seen yet, so the four quarter turns of each class count as classes of their own (as in
PASS, Zhu et al., CVPR 2021) and pictures are shifted a little. On the built-in digits, with as many steps, that takes the aligned
head on the frozen features from 61 % to 87 % of all ten classes, six of them unseen in the base session (seed 1993).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..method import backbones
from .data import Decoded

TURNS = 4
SHIFT = 1 / 8
"""of the picture's side"""
PEAK_LR = 2e-3


def train_base(backbone: nn.Module, pictures: Decoded, inputs: np.ndarray, classes: int, epochs: int, batch_size: int) -> nn.Linear:
    """Train the backbone in place on inputs float32 (N, 3, size, size), and freeze it. Returns the head of the upright classes."""
    device = next(backbone.parameters()).device
    head = nn.Linear(backbones.features(backbone), TURNS * classes).to(device)
    parameters = [*backbone.requires_grad_(True).parameters(), *head.parameters()]
    upright = torch.from_numpy(inputs)
    turned = torch.cat([torch.rot90(upright, k, (2, 3)) for k in range(TURNS)])
    targets = torch.cat([torch.from_numpy(pictures.targets) + k * classes for k in range(TURNS)])
    steps = -(-len(turned) // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps)
    reach = round(SHIFT * inputs.shape[-1])
    backbone.train()
    for _ in tqdm(range(epochs), desc="base", unit="epoch", disable=None):
        for batch in torch.randperm(len(turned)).split(batch_size):
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            moved = torch.roll(turned[batch], shift, (2, 3)).to(device)
            loss = nn.functional.cross_entropy(head(backbone(moved)), targets[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    backbone.requires_grad_(False).eval()
    found = nn.Linear(head.in_features, classes)
    with torch.no_grad():
        found.weight.copy_(head.weight[:classes])
        found.bias.copy_(head.bias[:classes])
    return found
