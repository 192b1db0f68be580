"""SD-LoRA itself: the layer arithmetic (`sdlora`) and the backbones it adapts (`backbones`).

Needs torch and timm.
"""
