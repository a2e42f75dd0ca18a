"""The models of the experiments of GLCAN (arXiv 2406.00446), as plain ``nn.Module`` s.

They know nothing of the compiler, and no builder downloads anything unless ``weights_backbone`` asks for it.
"""

from glcan_fx.models.edsr import EDSR, ResidualBlock, edsr, edsr_full
from glcan_fx.models.retinanet import RESNET_DEPTHS, retinanet
from glcan_fx.models.yolo import COCO_ANCHORS, YOLO, yolo

__all__ = ["COCO_ANCHORS", "EDSR", "RESNET_DEPTHS", "YOLO", "ResidualBlock", "edsr", "edsr_full"]
__all__ += ["retinanet", "yolo"]
