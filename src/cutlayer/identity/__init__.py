"""Who is who: keys, requests, certificates, kits, roles, revocation. No network, no model."""
