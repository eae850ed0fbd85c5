"""Certified robustness: lower bounds that no attack can cross, beside the upper bounds that attacks give."""

from sparring.certify.interval import interval_margin as interval_margin
from sparring.certify.rules import RULES as RULES
from sparring.certify.rules import propagate as propagate
from sparring.certify.rules import supported as supported
from sparring.certify.smoothed import SmoothedNet as SmoothedNet
from sparring.certify.smoothed import SmoothingBound as SmoothingBound
from sparring.certify.smoothing import Certificate as Certificate
from sparring.certify.smoothing import Smoothed as Smoothed
from sparring.certify.smoothing import certified as certified
from sparring.certify.smoothing import certify as certify
from sparring.certify.smoothing import lower_bound as lower_bound
from sparring.certify.smoothing import predict as predict
