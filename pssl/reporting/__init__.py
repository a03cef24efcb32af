"""The parts of a report: what a run left behind, charts, pictures, the page."""
