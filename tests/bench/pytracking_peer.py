"""pytracking in Django, as its README shows: its view, extended to store each open as a row."""

from __future__ import annotations

import os
from typing import Any

import django  # type: ignore[import-not-found, import-untyped, unused-ignore]  # as in flask_peer.py
from django.conf import settings  # type: ignore[import-not-found, import-untyped, unused-ignore]

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["BENCH_DATABASE"]}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    # Those of `startproject` that need no tables of their own.
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    PYTRACKING_CONFIGURATION={"base_open_tracking_url": "http://127.0.0.1/open/", "append_slash": True},
    ROOT_URLCONF=__name__,
    SECRET_KEY="of the benchmark",
    USE_TZ=True,
)
django.setup()

# These need the settings above.
from django.core.wsgi import get_wsgi_application  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: E402
from django.db import connection, models  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: E402
from django.urls import re_path  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: E402
from pytracking.django import OpenTrackingView  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: E402


class Event(models.Model):  # type: ignore[misc, unused-ignore]
    """One open."""

    email = models.TextField()
    user_agent = models.TextField(null=True)
    ip_address = models.TextField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        app_label = "bench"
        db_table = "events"


class Pixel(OpenTrackingView):  # type: ignore[misc, unused-ignore]
    """GET /open/DATA/."""

    def notify_tracking_event(self, tracking_result: Any) -> None:
        """Store the open, before the image is answered."""
        data = tracking_result.request_data
        Event.objects.create(
            email=tracking_result.metadata["email"], user_agent=data["user_agent"], ip_address=data["user_ip"]
        )


urlpatterns = [re_path(r"^open/(?P<path>[\w=-]+)/$", Pixel.as_view(), name="open_tracking")]

if "events" not in connection.introspection.table_names():
    with connection.schema_editor() as editor:
        editor.create_model(Event)
connection.close()
application = get_wsgi_application()
