"""Certified robustness: lower bounds that no attack can cross, beside the upper bounds that attacks give."""

from sparring.certify.interval import gaps_from_box as gaps_from_box
from sparring.certify.interval import interval_gaps as interval_gaps
from sparring.certify.interval import interval_margin as interval_margin
from sparring.certify.rules import RULES as RULES
from sparring.certify.rules import Channelwise as Channelwise
from sparring.certify.rules import Composed as Composed
from sparring.certify.rules import propagate as propagate
from sparring.certify.rules import supported as supported
from sparring.certify.smoothing import Certificate as Certificate
from sparring.certify.smoothing import SmoothedNet as SmoothedNet
from sparring.certify.smoothing import SmoothingBound as SmoothingBound
from sparring.certify.smoothing import clopper_pearson_lower as clopper_pearson_lower
from sparring.certify.smoothing import smoothed_certificate as smoothed_certificate
from sparring.certify.smoothing import smoothed_predict as smoothed_predict
from sparring.certify.smoothing import smoothed_votes as smoothed_votes
