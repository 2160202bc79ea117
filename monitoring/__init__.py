"""Grafana's dashboards as code, and a Prometheus to try them on."""
