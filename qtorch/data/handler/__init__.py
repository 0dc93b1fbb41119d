"""Handlers: loaders, raw and processed views, Alpha158 and Alpha360, filters, feature cache."""
