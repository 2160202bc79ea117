-- Who is refused for want of a good token? The address is NGINX's; the service does not log it.
CREATE OR REPLACE VIEW t5_requests.auth_failures AS
SELECT
  DATE(time) AS day,
  source,
  status,
  error_type,
  COALESCE(address, '-') AS address,
  COUNT(*) AS failures,
  MIN(time) AS first_failure,
  MAX(time) AS last_failure
FROM t5_requests.requests
WHERE auth_failure
GROUP BY 1, 2, 3, 4, 5
ORDER BY day, failures DESC, source, status, address;
