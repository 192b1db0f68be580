"""What the workstation needs of windows: a dataset's items, a backbone, the way to the model."""

from __future__ import annotations

import torch
from torch import nn
from windows import Windows, read_windows

from sdlora_edge.train.items import Item
from sdlora_edge.train.kinds import Modality
from sdlora_edge.train.upload import ArrayUpload


class Window(Item):
    noun = "window"

    def array(self, prepare):
        return prepare.item(self.open())

    def examine(self, decode):
        return self.open().size


class Convolutions(nn.Module):
    """A small net. Yours has pre-trained weights."""

    num_features = 64

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv1d(channels, 32, 9, stride=4)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 64)

    def forward(self, windows):
        steps = torch.relu(self.stem(windows.transpose(1, 2)))
        return self.fc2(torch.relu(self.fc1(steps.mean(2))))


class WindowModality(Modality):
    def read(self, path, domains=False):
        return {"": [Window(*one) for one in read_windows(path)]}

    def unlabelled(self, path):
        return [((label,), Window(name, label, read)) for name, label, read in read_windows(path)]

    def files(self, path, follow=True):
        return []

    def create(self, wanted):
        shape = tuple(int(n) for n in wanted.name.partition(":")[2].split("x"))
        return Convolutions(shape[1]).eval(), Windows(*shape)

    def upload(self, prepare, device):
        return ArrayUpload(prepare, device)
