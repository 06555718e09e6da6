# SPDX-License-Identifier: Apache-2.0
"""Calibration data: token ids, text, and recorded activations."""

from .activations import Activations as Activations
from .calibration import CalibrationSet as CalibrationSet
from .calibration import load_calibration as load_calibration
