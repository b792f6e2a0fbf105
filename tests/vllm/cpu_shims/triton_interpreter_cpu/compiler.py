from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    """Satisfies Triton's list of backends."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreter"

    def get_module_map(self):
        return {}

    def load_dialects(self, context):
        del context

    def parse_options(self, options):
        raise RuntimeError("this machine has no GPU: Triton kernels need TRITON_INTERPRET=1")

    def add_stages(self, stages, options, *rest):
        raise RuntimeError("this machine has no GPU: Triton kernels need TRITON_INTERPRET=1")
