"""Evaluations as one self-contained HTML page, made from their files alone: no model, no network."""

from sparring.report.generated import quality_folder as quality_folder
from sparring.report.page import write_report as write_report
