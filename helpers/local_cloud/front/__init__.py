"""What stands before the services: certificates, the proxy, HTTP, gRPC, and the accounts that clients ask
about."""
