"""The routes for embeddings, scores and ranked documents."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from qtool.serve.api.answering import while_connected
from qtool.serve.api.encodings.protocol import EmbeddingRequest, RerankRequest, ScoreRequest
from qtool.serve.api.encodings.reply import embed, rerank, score, score_labels
from qtool.serve.api.encodings.schemas import Embeddings, LabelScores, Ranking, Scores
from qtool.serve.host import ServiceHost
from qtool.serve.http.openapi import replies_with


def add_encoding_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the routes for models that encode texts."""

    @app.post("/v1/embeddings", responses=replies_with(Embeddings), tags=["OpenAI"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Return the embeddings of one or several texts."""
        return await while_connected(request, embed(host.ready("embed"), body))

    @app.post(
        "/score", responses=replies_with(Scores, LabelScores), tags=["vLLM"], operation_id="score"
    )
    @app.post("/v1/score", responses=replies_with(Scores, LabelScores), tags=["vLLM"])
    async def score_pairs(body: ScoreRequest, request: Request) -> Response:
        """Return how relevant documents are for queries, or the probabilities of tokens."""
        if body.label_token_ids is not None:
            answer = score_labels(host.ready("labels"), body, body.label_token_ids)
        else:
            answer = score(host.ready("score"), body)
        return await while_connected(request, answer)

    @app.post("/rerank", responses=replies_with(Ranking), tags=["Cohere"], operation_id="rerank")
    @app.post("/v1/rerank", responses=replies_with(Ranking), tags=["Cohere"])
    async def rerank_documents(body: RerankRequest, request: Request) -> Response:
        """Return documents in the order of their relevance for a query."""
        return await while_connected(request, rerank(host.ready("score"), body, repeat=True))

    @app.post("/v2/rerank", responses=replies_with(Ranking), tags=["Cohere"])
    async def rerank_documents_v2(body: RerankRequest, request: Request) -> Response:
        """Return the order of documents by their relevance for a query."""
        return await while_connected(request, rerank(host.ready("score"), body, repeat=False))
