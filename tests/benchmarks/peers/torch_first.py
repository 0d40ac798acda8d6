"""To be imported before torchvision, timm or fastai.

torchvision's wheel on PyPI is compiled against CUDA, so beside the torch for CPUs its operators do not load, and its
import fails at the first that it describes. No peer uses them; their names are enough.
"""

import torch

_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
