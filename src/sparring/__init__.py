"""Sparring: adversarial training that makes a network robust, measures it so that the number holds, and shows it."""

from sparring.attacks.attack import Attack as Attack
from sparring.attacks.attack import null as null
from sparring.attacks.attack import uniform as uniform
from sparring.attacks.autoattack import apgd as apgd
from sparring.attacks.autoattack import apgd_t as apgd_t
from sparring.attacks.catalogue import bim as bim
from sparring.attacks.catalogue import fgsm as fgsm
from sparring.attacks.catalogue import gradient_ascent as gradient_ascent
from sparring.attacks.catalogue import mi_fgsm as mi_fgsm
from sparring.attacks.catalogue import pgd as pgd
from sparring.attacks.combine import Restarts as Restarts
from sparring.attacks.eot import Averaged as Averaged
from sparring.attacks.fab import fab as fab
from sparring.attacks.fab import fab_t as fab_t
from sparring.attacks.smooth import smooth as smooth
from sparring.attacks.sparse import slide as slide
from sparring.attacks.square import square as square
from sparring.attacks.text import parse_attacks as parse_attacks
from sparring.certify.interval import interval_margin as interval_margin
from sparring.evaluation.findings import verdict as verdict
from sparring.evaluation.robustness import evaluate as evaluate
from sparring.evaluation.sanity import examine as examine
from sparring.model_state import attack_mode as attack_mode
from sparring.noise import Noise as Noise
from sparring.objectives import cross_entropy as cross_entropy
from sparring.objectives import dlr as dlr
from sparring.objectives import kl as kl
from sparring.objectives import margin as margin
from sparring.objectives import targeted as targeted
from sparring.runs import load as load
from sparring.threats import L1 as L1
from sparring.threats import L2 as L2
from sparring.threats import Ball as Ball
from sparring.threats import Linf as Linf
from sparring.threats import ThreatModel as ThreatModel
from sparring.threats import check_threat as check_threat
from sparring.threats import parse_threat as parse_threat
from sparring.training.loop import train as train
from sparring.training.recipes import mixed as mixed
from sparring.training.recipes import pgd_at as pgd_at
from sparring.training.recipes import standard as standard
from sparring.training.recipes import trades as trades
from sparring.types import AttackResult as AttackResult
from sparring.types import Model as Model

__version__ = "0.1.0"
