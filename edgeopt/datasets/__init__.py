"""Load calibration and evaluation text, one file per source."""
