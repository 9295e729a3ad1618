from .build import build_gallery as build_gallery
from .build import project_evidence as project_evidence
from .serve import serve_gallery as serve_gallery
