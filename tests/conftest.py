"""Settings for every test: the same hypothesis examples each time, so that a failure is one for everybody."""

import hypothesis

hypothesis.settings.register_profile("pssl", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("pssl")
