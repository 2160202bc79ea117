"""The HTTP side: from bytes on the wire to calls on the Summarizer and back."""
