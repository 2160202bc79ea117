-- One row per request, whoever logged it: the service's event and NGINX's line of the same id are
-- one request. Requests that NGINX answered itself (401, 403, 413, 429, 502, 504) have only its line.
--
-- `status` is what the client saw: NGINX's where there is one. Where an id was used more than once,
-- the first event belongs to the first line, and so on.
CREATE OR REPLACE VIEW t5_requests.requests AS
WITH numbered AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY source, request_id ORDER BY time, replica) AS nth
  FROM t5_requests.events
),
service AS (SELECT * FROM numbered WHERE source = 'service'),
nginx AS (SELECT * FROM numbered WHERE source = 'nginx'),
joined AS (
  SELECT
    COALESCE(service.time, nginx.time) AS time,
    COALESCE(service.request_id, nginx.request_id) AS request_id,
    IF(service.request_id IS NULL, 'nginx', 'service') AS source,
    service.schema_version,
    service.trace_id,
    COALESCE(service.client, nginx.client) AS client,
    nginx.address,
    COALESCE(service.method, nginx.method) AS method,
    -- A path nobody serves is anybody's invention: it gets no name of its own.
    CASE
      WHEN service.route IS NOT NULL THEN service.route
      WHEN nginx.route IN ('/v1/summarize', '/v1/summarize/batch', '/v1/models', '/hf/summarization')
        THEN nginx.route
      ELSE 'other'
    END AS route,
    COALESCE(nginx.status, service.status) AS status,
    service.error_type,
    service.model,
    service.model_revision,
    service.num_beams,
    service.max_new_tokens,
    service.length_words,
    service.length_sentences,
    service.stream,
    service.on_overflow,
    service.texts,
    service.characters,
    service.asked_tokens,
    service.input_tokens,
    service.output_tokens,
    service.chunks,
    service.truncated,
    service.cached,
    service.queue_ms,
    service.compute_ms,
    service.estimated,
    COALESCE(service.total_ms, nginx.total_ms) AS total_ms,
    service.replica,
    COALESCE(service.request_bytes, nginx.request_bytes) AS request_bytes,
    COALESCE(service.response_bytes, nginx.response_bytes) AS response_bytes,
    COALESCE(service.dropped_events, 0) AS dropped_events
  FROM service
  FULL OUTER JOIN nginx ON service.request_id = nginx.request_id AND service.nth = nginx.nth
)
SELECT
  * REPLACE (
    COALESCE(
      error_type,
      CASE
        WHEN status = 401 THEN 'unauthorized'
        WHEN status = 403 THEN 'forbidden'
        WHEN status = 413 THEN 'body-too-large'
        WHEN status = 429 THEN 'rate-limited'
        WHEN status = 499 THEN 'client-closed'
        WHEN status IN (502, 503, 504) THEN 'unavailable'
        WHEN status >= 500 THEN 'internal'
        WHEN status >= 400 THEN 'other'
      END
    ) AS error_type
  ),
  -- Not the page, its files, the documentation or health checks.
  STARTS_WITH(route, '/v1/') OR STARTS_WITH(route, '/hf/') AS is_call,
  -- Never NULL: what COUNTIF makes of nothing but NULLs differs between databases.
  COALESCE(status < 400 AND error_type IS NULL, FALSE) AS succeeded,
  COALESCE(status = 429 OR error_type = 'overloaded', FALSE) AS throttled,
  COALESCE(status IN (401, 403), FALSE) AS auth_failure,
  COALESCE(status >= 500, FALSE) AS server_error
FROM joined;
