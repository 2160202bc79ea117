"""Traces: spans of a request by OpenTelemetry. Imported only where tracing is on."""
