-- Who is told to come back later, and why: its rate of requests (NGINX), its tokens or its requests
-- at once (the service), or a full queue?
CREATE OR REPLACE VIEW t5_requests.throttled_calls AS
SELECT
  TIMESTAMP_TRUNC(time, HOUR) AS hour,
  COALESCE(client, '-') AS client,
  COUNTIF(source = 'nginx' AND COALESCE(error_type, '') != 'overloaded') AS over_rate,
  COUNTIF(source = 'service' AND COALESCE(error_type, '') != 'overloaded') AS over_limits,
  COUNTIF(COALESCE(error_type, '') = 'overloaded') AS queue_full,
  COUNT(*) AS calls
FROM t5_requests.requests
WHERE is_call AND throttled
GROUP BY 1, 2
ORDER BY hour, calls DESC, client;
