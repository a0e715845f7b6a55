"""The chat template: a module and not a file of jinja, so that it ships to the Hub with the code that uses it."""

TURN_END = "\n\n"
"""Ends a turn: token 261. After "…", "。" or "，" a token of that character and one newline, then token 11."""

CHAT_TEMPLATE = r"""{#- The prompt of every VisualRWKV release. Variables:
    image_position    where the pictures of a user message with text v are placed: "first": pictures, v;
                      "last": v, pictures; "middle", the sandwich: question, pictures, v
    sandwich_history  false: the question of the sandwich is v without the request for a short answer;
                      true: it is all user messages of the conversation, as in the original's training data,
                      so that a later message changes the text of an earlier one
-#}
{%- set image_position = image_position | default("first") -%}
{%- set sandwich_history = sandwich_history | default(false) -%}
{%- set short_answer = "Answer the question using a single word or phrase." -%}
{%- if image_position not in ["first", "middle", "last"] -%}
    {{- raise_exception("image_position must be 'first', 'middle' or 'last', got '" ~ image_position ~ "'.") -}}
{%- endif -%}

{#- A text may not contain a special token: it would be read as a picture or as the end of the document. -#}
{%- macro checked(text) -%}
    {%- for token in ["<image>", "<|endoftext|>"] if token in text -%}
        {{- raise_exception("A message's text contains '" ~ token ~ "', which is reserved. Remove it from the text; a picture is given as {'type': 'image', ...} in the message's content.") -}}
    {%- endfor -%}
    {{- text -}}
{%- endmacro -%}

{#- Without blank lines: only the template ends a turn. -#}
{%- macro collapse(text) -%}
    {%- for line in text.strip().split("\n") if line.strip() -%}
        {{- line ~ ("" if loop.last else "\n") -}}
    {%- endfor -%}
{%- endmacro -%}

{#- The texts of a message, one per line. -#}
{%- macro text_of(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content is defined and message.content is iterable -%}
        {%- for part in message.content if part.type != "image" -%}
            {%- if part.type != "text" or part.text is not string -%}
                {{- raise_exception("Content must be a text or of type 'image', got type '" ~ part.type ~ "'.") -}}
            {%- endif -%}
            {{- part.text ~ ("" if loop.last else "\n") -}}
        {%- endfor -%}
    {%- else -%}
        {{- raise_exception("A message's content must be a text or a list.") -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro images_of(message) -%}
    {%- if message.content is not string -%}
        {%- for part in message.content if part.type == "image" -%}
            {{- "<image>" ~ ("" if loop.last else "\n") -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{#- A user message in the first half of the sandwich. -#}
{%- macro question(text) -%}
    {{- collapse(text.replace(short_answer, "")) -}}
{%- endmacro -%}

{#- A system message has no turn of its own: its text is put before the first user message's. -#}
{%- set first = namespace(text="", index=0) -%}
{%- if messages and messages[0].role == "system" -%}
    {%- if messages | length == 1 or messages[1].role != "user" or images_of(messages[0]) -%}
        {{- raise_exception("A system message must hold text alone and be followed by a user message.") -}}
    {%- endif -%}
    {%- set first.text = text_of(messages[0]) ~ "\n" -%}
    {%- set first.index = 1 -%}
{%- endif -%}
{%- set turns = messages[first.index:] -%}

{%- set history = namespace(text="", separator="") -%}
{%- for message in turns if sandwich_history and message.role == "user" -%}
    {%- set text = (first.text if loop.first else "") ~ text_of(message) -%}
    {%- set history.text = history.text ~ history.separator ~ (question(text) if images_of(message) else text.strip()) -%}
    {%- set history.separator = "\n" -%}
{%- endfor -%}

{%- for message in turns -%}
    {%- set images = images_of(message) -%}
    {%- if message.role == "user" -%}
        {%- set raw = (first.text if loop.first else "") ~ text_of(message) -%}
        {%- set text = checked(collapse(raw)) -%}
        {%- if not images -%}
            {%- set body = text -%}
        {%- elif image_position == "first" -%}
            {%- set body = images ~ "\n" ~ text -%}
        {%- elif image_position == "middle" -%}
            {%- set before = history.text if sandwich_history else question(raw) -%}
            {%- set body = checked(before) ~ "\n" ~ images ~ "\n" ~ text -%}
        {%- else -%}
            {%- set body = text ~ "\n" ~ images -%}
        {%- endif -%}
        {{- "User:" ~ (" " ~ body.strip() ~ "\n\n" if body else "") -}}
    {%- elif message.role == "assistant" -%}
        {%- if images -%}
            {{- raise_exception("Only user messages can hold pictures, got one in an assistant message.") -}}
        {%- endif -%}
        {%- set text = checked(collapse(text_of(message))) -%}
        {{- "Assistant:" -}}
        {%- generation -%}
            {{- " " ~ text ~ "\n\n" if text else "" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("A message's role must be 'user' or 'assistant', or 'system' in the first message; got '" ~ message.role ~ "'.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant:" -}}
{%- endif -%}
"""


def collapse(text: str) -> str:
    """Return a text as the template's macro `collapse` writes it: stripped, and without blank lines."""
    return "\n".join(line for line in text.strip().split("\n") if line.strip())


def release_chat_template(image_position: str) -> str:
    """Return the chat template of a release, which places pictures at `image_position` unless told otherwise.

    Args:
        image_position: "first", "middle" or "last".
    """
    if image_position == "first":  # the template's own default
        return CHAT_TEMPLATE
    default = f'{{%- set image_position = image_position | default("{image_position}") -%}}\n'
    return default + CHAT_TEMPLATE
