"""HTTP application of a gateway: settings and workers -> services, routes and middleware. No Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Lifespan

from ..admission.authentication import Authenticator
from ..admission.login_codes import LoginCodes
from ..admission.quotas import (
    GATEWAY_CALLS,
    GATEWAY_CALLS_BESIDE,
    GATEWAY_CALLS_QUEUED,
    REGISTRY_READS,
)
from ..admission.rate_limits import RateLimiter
from ..concurrency import ActiveTenants, TenantConcurrencyLimit, TenantReads
from ..errors import Unavailable
from ..observability import log_format, tracing
from ..observability.request_log import RequestLogMiddleware, RequestMetrics
from ..registry.audit import AuditLog
from ..registry.cache import RegistryCache
from ..registry.datasets.files import DatasetFiles
from ..registry.datasets.index import DatasetIndex
from ..registry.datasets.kept import KeptImages
from ..registry.datasets.staging import StagedDatasets
from ..registry.datasets.trainings import TrainingRegistry
from ..registry.datasets.usage import UsageRegistry
from ..registry.events import EventLog
from ..registry.health import RegistryIntegrity, RegistryWatch
from ..registry.keys import KeyRegistry
from ..registry.redis.connection import RegistryConnection
from ..registry.status import StatusBoard
from ..registry.tasks import TaskRegistry
from ..registry.tenants import TenantRegistry
from ..services.administration import AdministrationService
from ..services.archives.dataset_archive import DatasetArchive
from ..services.archives.training_archive import TrainingArchive
from ..services.classification import ClassificationService
from ..services.datasets.features import FeatureService
from ..services.datasets.images import DatasetService
from ..services.datasets.keeping import Keeper
from ..services.datasets.removal import FileRemoval
from ..services.datasets.review import ReviewService
from ..services.decoding.decoder import ImageDecoder
from ..services.garbage_collection import Collector, keep_bound
from ..services.many_tasks import ManyTasksService
from ..services.registration import RegistrationService
from ..services.thread_pools import ThreadPools
from ..services.trainings.answers import VersionAnswers
from ..services.trainings.backtest import BacktestService
from ..services.trainings.comparison import ComparisonService
from ..services.trainings.jobs import JobSettings, TrainingJobs
from ..services.trainings.promotion import PromotionService
from ..services.trainings.service import TrainingService
from ..services.usage.counter import UsageCounter
from ..services.usage.errors import ErrorCounter
from ..services.usage.service import UsageService
from ..settings import Settings
from ..storage.accounts import FileRegistry
from ..storage.features import FeatureStore
from ..storage.remote_sources import RemoteSources
from ..storage.store import IMAGES, REPORTS, SNAPSHOTS, Store
from ..training.job import Trainer
from ..worker_api import Workers
from . import openapi
from .admin import add_admin_routes
from .console.files import add_console
from .datasets.images import add_dataset_routes
from .datasets.trainings import add_training_routes
from .datasets.usage import add_usage_routes
from .dependencies import CallerDependencies
from .limits.unread_replies import ReplyMemory, UnreadRepliesMiddleware
from .limits.upload_guard import BodyMemory, BodyPace, UploadGuardMiddleware
from .problems import add_exception_handlers
from .protocols.huggingface import add_huggingface_routes
from .protocols.oip import add_oip_routes
from .request_heads import HeaderLimitsMiddleware, UnreadBodyMiddleware
from .security_headers import SecurityHeadersMiddleware, cors
from .tasks import add_backbone_route, add_classify_routes, add_health_routes, add_task_routes


class GatewayAPI(FastAPI):
    """FastAPI application with the hub's middleware, OpenAPI document and problems; routes are added to it."""

    def __init__(
        self,
        settings: Settings,
        active: ActiveTenants,
        metrics: RequestMetrics | None = None,
        lifespan: Lifespan[FastAPI] | None = None,
        errors: ErrorCounter | None = None,
    ) -> None:
        """Make an application without routes; `create_app` describes the metrics."""
        super().__init__(
            title="karst-hub",
            lifespan=lifespan,
            docs_url=None,
            redoc_url=None,
            # A redirect has the scheme and the path that the gateway sees, which differ behind a proxy.
            redirect_slashes=False,
            root_path_in_servers=False,
            generate_unique_id_function=lambda route: route.name,
        )
        self._settings = settings
        self._active = active
        self._metrics = metrics
        self._count = errors.count if errors is not None else None
        add_exception_handlers(self)

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application inside of all its middleware. Starlette calls this at the first request."""
        settings = self._settings
        stack = [  # outermost first
            Middleware(UnreadBodyMiddleware, behind_haproxy=settings.haproxy),
            Middleware(RequestLogMiddleware, self._metrics, self._count, server_returns_id=self._metrics is not None),
            Middleware(SecurityHeadersMiddleware, tls=settings.tls_cert is not None),
            Middleware(HeaderLimitsMiddleware),
            *cors(settings.cors_origins),
            Middleware(
                UploadGuardMiddleware,
                memory=BodyMemory(),
                pace=BodyPace(self._active),
                route_keeps_bytes=max(settings.max_request_bytes, settings.max_adapter_bytes),
                behind_haproxy=settings.haproxy,
            ),
            Middleware(UnreadRepliesMiddleware, memory=ReplyMemory()),
        ]
        app = super().build_middleware_stack()  # unexpected errors, `PlainRouteMiddleware`, other errors, the routes
        for layer in reversed(stack):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document. FastAPI creates it at the first call and keeps it."""
        is_new = self.openapi_schema is None
        document = super().openapi()
        if is_new:
            openapi.complete(document)
        return document


def create_app(
    settings: Settings,
    workers: Workers,
    trainer: Trainer | None = None,
    metrics: RequestMetrics | None = None,
    *,
    tenant_calls: int = GATEWAY_CALLS,
    tenant_waiting: int = GATEWAY_CALLS_QUEUED,
    redis_patience: float = 1,
) -> GatewayAPI:
    """Return one gateway's HTTP application with all its collaborators. `state.cache` is its registry cache.

    Args:
        settings: `redis_url` and `store_url` must be set.
        trainer: runs trainings as jobs; None: this gateway runs none.
        metrics: counters of requests in a Ray Serve replica. The application then also configures the process's logs
            and traces, and leaves the reply's `x-request-id` to Serve. None outside of Ray Serve.
        tenant_calls, tenant_waiting: classifications of one tenant that run, and that are queued; others are refused.
        redis_patience: see `RegistryConnection`.
    """
    if metrics is not None:
        log_format.start(settings.log_format, settings.log_level)
        tracing.start(settings.traces_exporter, settings.otlp_protocol)
    active = ActiveTenants()
    pools, reads = ThreadPools(active), TenantReads(REGISTRY_READS, active)
    database = RegistryConnection(str(settings.redis_url), audit_days=settings.audit_days, patience=redis_patience)
    registry, tenants, keys = TaskRegistry(database), TenantRegistry(database), KeyRegistry(database)
    store = Store(str(settings.store_url), min_free_bytes=settings.min_free_disk)
    cache = RegistryCache(tasks=registry, keys=keys, tenants=tenants, events=EventLog(database))
    limiter = RateLimiter(database, cache, keys)
    decoder = ImageDecoder(
        pools.decoders,
        pools.slow_decoders,
        pools.parse,
        active,
        threads=pools.threads,
        cores=pools.cores,
        spare_threads=pools.spare_decoders,
        processes=pools.processes,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
    )
    integrity, staging, board = RegistryIntegrity(database), StagedDatasets(database), StatusBoard(database)
    watch = RegistryWatch(database, cache.resynchronise, metrics.record_registry if metrics is not None else None)
    index, dataset_files, kept = DatasetIndex(database, reads), DatasetFiles(database), KeptImages(database)
    images, snapshots, reports = [
        Store(str(settings.store_url), kind, settings.min_free_disk) for kind in (IMAGES, SNAPSHOTS, REPORTS)
    ]
    usage_registry, features = UsageRegistry(database), FeatureStore(str(settings.store_url))
    removal = FileRemoval(
        files=dataset_files,
        kept=kept,
        integrity=integrity,
        images=images,
        snapshots=snapshots,
        reports=reports,
        features=features,
        pool=pools.store.of(""),
    )
    counter = UsageCounter(usage_registry, count_lost=metrics.record_lost_usage if metrics is not None else None)
    keeper = Keeper(
        kept=kept,
        images=images,
        removal=removal,
        threads=pools.store,
        usage=counter,
        count=metrics.record_kept if metrics is not None else None,
    )
    service = ClassificationService(
        registry=registry,
        cache=cache,
        limiter=limiter,
        decoder=decoder,
        workers=workers,
        keeper=keeper,
        reads=reads,
        usage=counter,
    )
    many = ManyTasksService(service, cache=cache, limiter=limiter, decoder=decoder, workers=workers)
    audit = AuditLog(database, reads)
    collector = Collector(
        registry=registry,
        files=FileRegistry(database),
        integrity=integrity,
        audit=audit,
        store=store,
        datasets=removal,
        pool=pools.store.of(""),
        interval_s=settings.gc_interval_s,
        age_s=settings.gc_age_s,
    )
    changes = RegistrationService(
        registry=registry,
        cache=cache,
        store=store,
        sources=RemoteSources(settings.sources, max_bytes=settings.max_adapter_bytes),
        classification=service,
        collector=collector,
        store_threads=pools.store,
        parse_threads=pools.parse,
        source_threads=pools.sources,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    feature_service = FeatureService(
        files=dataset_files,
        images=images,
        features=features,
        decoder=decoder,
        workers=workers,
        limits=service.limits,
        threads=pools.store,
    )
    datasets = DatasetService(
        index=index,
        tasks=registry,
        images=images,
        features=feature_service,
        removal=removal,
        decoder=decoder,
        limiter=limiter,
        threads=pools.store,
        parse_threads=pools.parse,
        unpack_threads=pools.unpack,
        max_image_bytes=settings.max_image_bytes,
        min_free_bytes=settings.min_free_disk,
    )
    reviews = ReviewService(index, feature_service, keeper, counter, pools.fits)
    training_registry = TrainingRegistry(database, reads)
    answers = VersionAnswers(
        trainings=training_registry,
        tasks=registry,
        adapters=store,
        images=images,
        snapshots=snapshots,
        features=feature_service,
        classification=service,
        threads=pools.store,
        parse_threads=pools.parse,
        fits=pools.fits,
    )
    comparison, backtests = ComparisonService(index, answers, pools.parse), BacktestService(index, answers)
    promotion = PromotionService(tasks=registry, registration=changes, comparison=comparison)
    jobs = TrainingJobs(
        trainings=training_registry,
        tasks=registry,
        snapshots=snapshots,
        reports=reports,
        classification=service,
        promotion=promotion,
        trainer=trainer,
        settings=JobSettings.of(settings),
        threads=pools.store,
    )
    trainings = TrainingService(
        index=index,
        trainings=training_registry,
        tasks=registry,
        snapshots=snapshots,
        reports=reports,
        features=feature_service,
        removal=removal,
        classification=service,
        promotion=promotion,
        jobs=jobs,
        threads=pools.store,
        parse_threads=pools.parse,
        fits=pools.fits,
    )
    usage = UsageService(
        counter=counter,
        registry=usage_registry,
        tasks=registry,
        trainings=training_registry,
        snapshots=snapshots,
        reads=reads,
        threads=pools.store,
        parse_threads=pools.parse,
    )
    errors = ErrorCounter(board)
    trained = TrainingArchive(training_registry, staging, snapshots, pools.store)
    archive = DatasetArchive(
        index, staging, trained, images, feature_service, decoder, pools.store, pools.parse, settings.max_image_bytes
    )
    administration = AdministrationService(
        registry=registry,
        tenants=tenants,
        keys=keys,
        audit=audit,
        status=board,
        trainings=training_registry,
        collector=collector,
        cache=cache,
        store=store,
        registration=changes,
        datasets=archive,
        reads=reads,
        threads=pools.store,
        max_adapter_bytes=settings.max_adapter_bytes,
        min_free_bytes=settings.min_free_disk,
    )

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        steps = (
            cache.follow(),
            limiter.run(),
            watch.run(),
            registry.upgrade(),
            keep_bound(integrity, store, pools.store.of("")),
            collector.run(),
            feature_service.run(),
            removal.run(),
            keeper.run(),
            counter.run(),
            errors.run(),
            jobs.run(),
        )
        background = {asyncio.create_task(step) for step in steps}
        yield
        while background:  # repeated: a timeout of the Redis client can swallow a cancellation
            for task in background:
                task.cancel()
            _, background = await asyncio.wait(background, timeout=1)
        await jobs.close()
        await feature_service.close()
        for last in (counter.write(), errors.write(), limiter.settle()):
            with suppress(Unavailable):
                await last
        await database.close()
        pools.close()
        if metrics is not None:
            tracing.stop()

    api = GatewayAPI(settings, active, metrics, lifespan, errors)
    dependencies = CallerDependencies(authenticator := Authenticator(cache, limiter), pools.parse)
    limit = TenantConcurrencyLimit(active.limit(tenant_calls, GATEWAY_CALLS_BESIDE), tenant_calls + tenant_waiting)
    max_request_bytes = settings.max_request_bytes
    # First: the router compares a request with all routes before its own.
    add_classify_routes(api, service, many, dependencies, limit, max_request_bytes=max_request_bytes)
    add_health_routes(api, service)
    checkpoint = settings.checkpoint.name if settings.checkpoint else None
    add_backbone_route(api, service, dependencies, image_size=settings.image_size, checkpoint=checkpoint)
    add_task_routes(api, service, changes, dependencies, authenticator, max_adapter_bytes=settings.max_adapter_bytes)
    add_dataset_routes(api, datasets, reviews, dependencies, max_request_bytes=max_request_bytes)
    add_training_routes(api, trainings, comparison, dependencies)
    add_usage_routes(api, usage, backtests, dependencies)
    add_admin_routes(api, administration, dependencies)
    add_huggingface_routes(api, service, dependencies, limit, max_request_bytes=max_request_bytes)
    add_oip_routes(api, service, dependencies, limit, max_request_bytes=max_request_bytes)
    openapi.add_pages(api)
    add_console(api, LoginCodes(database))
    api.state.cache = cache
    return api
