// Shows the document that the page names. A token that is typed in here stays in this page: it is kept nowhere.
"use strict";

const shown = document.getElementById("swagger-ui").dataset.document;

SwaggerUIBundle({
  url: shown,
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  syntaxHighlight: { activated: false },
  ...(shown === "/openapi.json" ? {} : { supportedSubmitMethods: [] }), // at another door
});
