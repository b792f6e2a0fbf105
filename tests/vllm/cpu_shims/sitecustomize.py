"""Run by Python at its start: lets torchvision be imported beside a CPU build of torch."""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


class DeclareOperators(MetaPathFinder):
    """Declares torchvision's operators right before the module that registers shapes for them."""

    libraries = []

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and not self.libraries:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            self.libraries.append(library)  # an operator lives as long as its library
            for schema in OPERATORS:
                if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                    library.define(schema)


sys.meta_path.insert(0, DeclareOperators())
