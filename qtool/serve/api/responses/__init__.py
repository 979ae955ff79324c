"""OpenAI's `POST /v1/responses`, over chats; nothing is stored."""
