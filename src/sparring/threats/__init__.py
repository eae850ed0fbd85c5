"""Threat models: what may be changed."""

from sparring.threats.balls import L2 as L2
from sparring.threats.balls import Ball as Ball
from sparring.threats.balls import Linf as Linf
from sparring.threats.base import ThreatModel as ThreatModel
from sparring.threats.base import check_threat as check_threat
from sparring.threats.base import inside as inside
from sparring.threats.l1 import L1 as L1
from sparring.threats.lens import Lens as Lens
from sparring.threats.named import THREATS as THREATS
from sparring.threats.named import make_threat as make_threat
from sparring.threats.named import threat_text as threat_text
