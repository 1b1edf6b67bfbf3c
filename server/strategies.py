"""How an image can be evaluated here: for each protocol and stop rule, which views in which order, and when to stop."""

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_ensemble.export.bundle import Bundle
from resnet_ensemble.export.engines import EngineInfo
from resnet_ensemble.server import calibration
from resnet_ensemble.server.calibration import Calibration, NotCalibrated
from resnet_ensemble.server.costs import Cost
from resnet_ensemble.server.plan import Plan, cheapest_first
from resnet_ensemble.server.stopping import CALIBRATED, RULES, StopRule
from resnet_ensemble.training.views import ALL_PROTOCOLS, block_pixels, block_sizes


@dataclass(frozen=True)
class Strategy:
    """The plan that is run, the rule that ends it, and the temperature of its probabilities if one is known to help.

    - draft: as in images.decode; only where a certificate covers it
    """

    plan: Plan
    rule: StopRule
    temperature: float | None
    draft: int | None = None


class Strategies:
    """Those of a bundle on certain engines. Raises BundleInvalid for a damaged stopping.json.

    - engines, costs: of each member
    - calibrations: by protocol, what stopping.json has for these engines
    """

    def __init__(self, bundle: Bundle, engines: Sequence[EngineInfo], costs: Sequence[Cost]) -> None:
        self.calibrations: dict[str, Calibration] = {}
        self._missing: dict[str, str] = {}  # protocols without thresholds, and why
        self._all: dict[tuple[str, str], Strategy] = {}
        members = bundle.manifest.members
        for protocol in ALL_PROTOCOLS:
            seconds = [
                [
                    cost.seconds * pixels / member.preprocessing.crop**2
                    for pixels in block_pixels(member.preprocessing, protocol)
                ]
                for member, cost in zip(members, costs, strict=True)
            ]
            plan = cheapest_first(protocol, seconds, block_sizes(protocol))
            found = self._find(bundle, protocol, engines)
            for name, rule in RULES.items():
                self._all[protocol, name] = Strategy(plan, rule, found.temperature(name) if found else None)
            if found:
                self._all[protocol, CALIBRATED] = Strategy(
                    found.ordered_plan(seconds),
                    found.rule,
                    found.temperature(CALIBRATED),
                    found.draft_side,
                )

    @property
    def rules(self) -> tuple[str, ...]:
        """Stop rules that at least one protocol has."""
        return (*RULES, CALIBRATED) if self.calibrations else tuple(RULES)

    def of(self, protocol: str, rule: str) -> Strategy:
        """How to evaluate. Raises NotCalibrated for `calibrated` where these engines have no thresholds."""
        if (protocol, rule) not in self._all:
            raise NotCalibrated(self._missing[protocol])
        return self._all[protocol, rule]

    def _find(self, bundle: Bundle, protocol: str, engines: Sequence[EngineInfo]) -> Calibration | None:
        try:
            self.calibrations[protocol] = calibration.find(bundle, protocol, engines)
        except NotCalibrated as error:
            self._missing[protocol] = str(error)
        return self.calibrations.get(protocol)
