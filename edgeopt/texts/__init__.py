"""Where calibration and evaluation text comes from: one file a source."""
