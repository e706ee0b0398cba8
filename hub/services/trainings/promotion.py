"""Registration of a training's version, and its promotion to the alias `stable` by the task's rule."""

from ...admission.authentication import Caller
from ...dataset_schemas import Promotion
from ...errors import HubError
from ...registry.tasks import TaskRegistry
from ...schemas import Registered
from ..registration import RegistrationService
from .comparison import ComparisonService

STABLE = "stable"


class PromotionService:
    """Versions that trainings made."""

    def __init__(
        self, *, tasks: TaskRegistry, registration: RegistrationService, comparison: ComparisonService
    ) -> None:
        self._tasks = tasks
        self._registration = registration
        self._comparison = comparison

    async def register(
        self, caller: Caller, task: str, data: bytes, training: tuple[str, str] | None = None
    ) -> tuple[Registered, Promotion | None]:
        """Register a version as `latest`, and move `stable` to it if the task's rule says so.

        Args:
            task: name of a task of the caller's tenant.
            training: the job that made the version, and the token of its gateway; "" for a training in a request.

        Returns:
            The version, and the decision; None with the rule `never`.

        Raises:
            HubError: any error of `RegistrationService.register`.
            TrainingEndedError: the gateway no longer has the job.
        """
        rule = (await self._tasks.task(caller.tenant, task)).settings.promote
        alias = STABLE if rule == "always" else None
        registered, _ = await self._registration.register(
            caller, task, data, alias, labels_may_change=True, training=training
        )
        if rule == "never":
            return registered, None
        if rule == "always":
            return registered, Promotion(promoted=True, reason="the task promotes each new version")
        return registered, await self._decide(caller, task, registered.version)

    async def _decide(self, caller: Caller, task: str, version: int) -> Promotion:
        """Promote a version that is better than the stable one by more than one standard error."""
        stable = (await self._tasks.task(caller.tenant, task)).aliases.get(STABLE)
        try:
            if stable is None:
                decision = Promotion(promoted=True, reason="the task had no stable version")
            elif version in stable:
                return Promotion(promoted=False, reason="the version was stable already")
            else:
                decision = await self._compared(caller, task, version)
            if decision.promoted:
                await self._registration.set_alias(caller, task, STABLE, {version: 1})
        except HubError as error:  # the version is registered in any case
            return Promotion(promoted=False, reason=error.detail)
        return decision

    async def _compared(self, caller: Caller, task: str, version: int) -> Promotion:
        found = await self._comparison.compare(caller, task, STABLE, str(version))
        promoted = found.better == "b"
        figures = f"{found.b.accuracy:.1%} against {found.a.accuracy:.1%} on {found.images} test images"
        verdict = "better" if promoted else "not better by more than one standard error"
        return Promotion(
            promoted=promoted,
            reason=f"version {version} is {verdict} than version {found.a.version}: {figures}",
            images=found.images,
            stable_accuracy=found.a.accuracy,
            new_accuracy=found.b.accuracy,
            standard_error=found.standard_error,
        )
