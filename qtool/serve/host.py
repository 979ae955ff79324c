"""`ServiceHost`: what stands behind the routes, first `Loading` and then the `Service`."""

from __future__ import annotations

from qtool.serve.metrics import Metrics
from qtool.serve.service import Loading, ServedTask, Service
from qtool.serve.settings import ServeSettings
from qtool.serve.threads import Threads


class ServiceHost:
    """Holds what the routes call, from the start of the server to its end."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.name)
        self.threads = Threads()
        self.current: Loading | Service = Loading()

    def ready(self, task: ServedTask | None = None) -> Service:
        """Return the service.

        Raises: Busy, unless it takes requests; UsageError, when the model does not do ``task``.
        """
        return self.current.ready(task)

    def set_service(self, service: Service) -> None:
        """Let requests reach ``service``, unless the server is ending."""
        service.draining = self.current.draining
        self.current = service
