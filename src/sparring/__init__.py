"""Sparring: adversarial training that makes a network robust, measures it so that the number holds, and shows it."""

from sparring.app.train_run import load as load
from sparring.attacks.around import Restarts as Restarts
from sparring.attacks.autoattack import apgd as apgd
from sparring.attacks.autoattack import apgd_t as apgd_t
from sparring.attacks.catalogue import bim as bim
from sparring.attacks.catalogue import fgsm as fgsm
from sparring.attacks.catalogue import gradient_ascent as gradient_ascent
from sparring.attacks.catalogue import mi_fgsm as mi_fgsm
from sparring.attacks.catalogue import pgd as pgd
from sparring.attacks.eot import Averaged as Averaged
from sparring.attacks.fab import fab as fab
from sparring.attacks.fab import fab_t as fab_t
from sparring.attacks.loop import Attack as Attack
from sparring.attacks.smooth import smooth as smooth
from sparring.attacks.sparse import slide as slide
from sparring.attacks.square import square as square
from sparring.attacks.starts import null as null
from sparring.attacks.starts import uniform as uniform
from sparring.attacks.text import parse_attacks as parse_attacks
from sparring.certify.interval import interval_margin as interval_margin
from sparring.checks.battery import examine as examine
from sparring.core.model_state import attack_mode as attack_mode
from sparring.core.noise import Noise as Noise
from sparring.core.objectives import cross_entropy as cross_entropy
from sparring.core.objectives import dlr as dlr
from sparring.core.objectives import kl as kl
from sparring.core.objectives import margin as margin
from sparring.core.objectives import targeted as targeted
from sparring.core.types import AttackResult as AttackResult
from sparring.core.types import Model as Model
from sparring.evaluation.measure import measure as measure
from sparring.results.findings import verdict as verdict
from sparring.threats import L1 as L1
from sparring.threats import L2 as L2
from sparring.threats import Ball as Ball
from sparring.threats import Linf as Linf
from sparring.threats import ThreatModel as ThreatModel
from sparring.threats import check_threat as check_threat
from sparring.threats import make_threat as make_threat
from sparring.training.loop import train as train
from sparring.training.recipes import mixed as mixed
from sparring.training.recipes import pgd_at as pgd_at
from sparring.training.recipes import standard as standard
from sparring.training.recipes import trades as trades

evaluate = measure
__version__ = "0.1.0"
