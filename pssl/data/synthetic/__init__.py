"""A procedural data set for weakly supervised segmentation, written as a real VOC 2012 folder.

``python -m pssl.data.synthetic OUT [--variant uniform] [--seed 0] [--train 600] [--val 200] [--size 96]``

Six classes of creatures on six sceneries. In the ``parts`` variant an object has a small badge that alone
tells its class (about a third of its area) and a large plainer body whose kind three classes share; a class
is mostly, not always, seen with its own scenery. A classifier therefore looks at the badge, and its class
activation maps (CAMs) miss the body, as they miss the bodies of animals in photographs. In the ``uniform``
variant the class pattern covers the object whole: the control, where there is little for a method against
that failure to gain.
"""

from .folder import SyntheticConfig, ensure_synthetic, generator_version, write_synthetic

__all__ = ["SyntheticConfig", "ensure_synthetic", "generator_version", "write_synthetic"]
