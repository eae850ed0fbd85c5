"""Threat models: what may be changed."""

from sparring.threats.balls import L2 as L2
from sparring.threats.balls import Ball as Ball
from sparring.threats.balls import Linf as Linf
from sparring.threats.base import ThreatModel as ThreatModel
from sparring.threats.base import at_factor as at_factor
from sparring.threats.base import check_threat as check_threat
from sparring.threats.base import inside as inside
from sparring.threats.l1 import L1 as L1
from sparring.threats.text import THREATS as THREATS
from sparring.threats.text import format_threat as format_threat
from sparring.threats.text import parse_threat as parse_threat
