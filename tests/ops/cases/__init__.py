"""What the tests know of one operator alone, a file for each: ``cases/<op>.py``.

A file is a test module. Its ``test_*`` functions hold the operator to something other than its reference: a literal
loop, peers' code, laws. The tests in ``tests/ops`` that run over all operators read its tables:

``SOUND``          arguments by name that the public function takes
``BAD_CALLS``      arguments to put in their place, and what the error says behind "<op>: "
``MODULE``         the module form in pssl_ext.nn; None where there is none
``training_size``  from a random generator, the arguments at the size that training has
``FAULTS``         wrong kernels (``support.Fault``) that the comparison with the reference must refuse
``GRADIENT_SAMPLE`` the sample on which it must refuse wrong gradients; None for an operator without any
"""

from importlib import import_module
from types import ModuleType

PARTS = ("SOUND", "BAD_CALLS", "MODULE", "training_size", "FAULTS", "GRADIENT_SAMPLE")


def case_of(op: str) -> ModuleType:
    """Return the operator's file as a module.

    Raises:
        ModuleNotFoundError: there is none.
    """
    return import_module(f"cases.{op}")
