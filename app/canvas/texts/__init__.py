"""All texts of the canvas, each in English and in French; the browser's language chooses."""

from contextvars import ContextVar

import streamlit as st

LANGUAGES = ("en", "fr")
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

TEXTS: dict[str, tuple[str, str]] = {
    # The pages.
    "draw": ("Draw", "Dessiner"),
    "generate": ("Generate", "Générer"),
    "surprise": ("Surprise", "Surprise"),
    "models": ("Models", "Modèles"),
    "draw_title": ("Draw the beginning. PixelCNN finishes it.", "Dessinez le début. PixelCNN le finit."),
    "generate_title": ("What the model dreams of", "Ce dont rêve le modèle"),
    "surprise_title": ("How surprised is the model?", "Le modèle est-il surpris ?"),
    "models_title": ("What is served", "Les modèles en service"),
    # What `make demo` tells.
    "training": ("Beside this page: {doing} {what}", "En même temps : {doing} {what}"),
    "validation": ("validation {nll}", "validation {nll}"),
    "left": ("{left} left", "encore {left}"),
    "quick_start_done": (
        "The quick start is trained: choose mnist5k to draw with it.",
        "Le démarrage rapide est entraîné : choisissez mnist5k pour dessiner avec lui.",
    ),
    "quick_start_failed": (
        "The quick start failed; the terminal of `make demo` says where to look. This page goes on without it.",
        "Le démarrage rapide a échoué ; le terminal de `make demo` dit où regarder. Cette page continue sans lui.",
    ),
    "invite": ("Invite others", "Inviter"),
    "invite_help": (
        "Whoever is in the same network and opens this link draws along.",
        "Qui est dans le même réseau et ouvre ce lien dessine avec vous.",
    ),
    "invite_picture": ("The link as a QR code", "Le lien en code QR"),
    "not_invited": (
        "This canvas is shared by a link, and this is another one. Open the link that you were given, whole.",
        "Ce canevas est partagé par un lien, et celui-ci en est un autre. Ouvrez le lien reçu, en entier.",
    ),
    # The drawing grid.
    "grid": (
        "Drawing grid: draw with mouse, finger or pen; or go with the arrow keys, and draw with Space",
        "Grille de dessin : dessinez à la souris, au doigt ou au stylet ; ou déplacez-vous avec les flèches et "
        "dessinez avec Espace",
    ),
    "draw_here": ("Draw here", "Dessinez ici"),
    "tools": ("Drawing tools", "Outils de dessin"),
    "pen": ("Pen", "Crayon"),
    "eraser": ("Eraser", "Gomme"),
    "eraser_help": ("takes ink and marks away", "enlève l'encre et les marques"),
    "more": ("More", "Plus"),
    "more_help": ("More tools", "Plus d'outils"),
    "blank": ("Blank", "Blanc"),
    "blank_help": ("nothing is to be drawn here", "rien ne doit être dessiné ici"),
    "hole": ("Hole", "Trou"),
    "hole_help": ("the model draws here, whatever else is known", "le modèle dessine ici, quoi que l'on sache"),
    "soft": ("Soft", "Doux"),
    "soft_help": ("soft edge of the pen", "bord doux du crayon"),
    "brush_group": ("Brush width in cells", "Largeur du pinceau en cases"),
    "brush": ("Brush {width} wide", "Pinceau de {width}"),
    "undo": ("Undo", "Annuler"),
    "redo": ("Redo", "Rétablir"),
    "clear": ("Clear", "Effacer"),
    "clear_help": ("undo brings it back", "annuler le ramène"),
    "colour_group": ("Colour of the pen", "Couleur du crayon"),
    "colour": ("Colour", "Couleur"),
    "black": ("Black", "Noir"),
    "white": ("White", "Blanc"),
    "grey": ("Grey", "Gris"),
    "red": ("Red", "Rouge"),
    "yellow": ("Yellow", "Jaune"),
    "green": ("Green", "Vert"),
    "blue": ("Blue", "Bleu"),
    "brown": ("Brown", "Brun"),
    "cell": ("Row {row}, column {column}: {state}", "Ligne {row}, colonne {column} : {state}"),
    "cell_ink": ("ink", "encre"),
    "cell_blank": ("blank", "blanc"),
    "cell_unknown": ("unknown", "inconnu"),
    # The page to draw on.
    "intro": (
        "{beginning}: the model shows {number} ways it could go on.",
        "{beginning} : le modèle montre {number} façons de continuer.",
    ),
    "begin_paint": ("Paint a part of a picture", "Peignez une partie d'une image"),
    "begin_digit": ("Draw a part of a digit", "Dessinez une partie d'un chiffre"),
    "begin_digit_top": ("Start a digit from the top", "Commencez un chiffre par le haut"),
    "begin_other": ("Draw a part of a picture", "Dessinez une partie d'une image"),
    "begin_other_top": ("Draw the upper part of a picture", "Dessinez le haut d'une image"),
    "complete": ("Complete", "Compléter"),
    "another": ("Another {number}", "Encore {number}"),
    "nine": ("nine", "neuf"),
    "live": ("As I draw", "En direct"),
    "waiting": (
        "Endings appear here, each with its exact probability.",
        "Les fins apparaissent ici, chacune avec sa probabilité exacte.",
    ),
    "ending": ("Ending {rank}", "Fin {rank}"),
    "image": ("Image {rank}", "Image {rank}"),
    "being_drawn": ("being drawn", "en cours"),
    "continue": ("Continue from ending {rank}", "Continuer à partir de la fin {rank}"),
    "continue_help": ("Continue from this ending", "Continuer à partir de cette fin"),
    "continue_seed": ("Continue from the ending of seed {seed}", "Continuer à partir de la fin de la graine {seed}"),
    "yours": ("yours", "à vous"),
    "added": ("added by the model", "ajouté par le modèle"),
    "nats_help": ("nats: nearer 0 is likelier", "nats : plus près de 0, plus probable"),
    "by": ("by {model}", "par {model}"),
    "gallery": ("This visit: the likeliest ending each time", "Cette visite : chaque fois la fin la plus probable"),
    "serving": ("Serving {model}", "En service : {model}"),
    "version": ("{name} version {version}", "{name} version {version}"),
    "order": ("Order", "Ordre"),
    "order_drawn": ("As drawn", "Comme dessinées"),
    "order_likely": ("Likely first", "Probables d'abord"),
    "order_rare": ("Rare first", "Rares d'abord"),
    "examples": ("Real test images, begun:", "De vraies images de test, commencées :"),
    "example": ("Go on from test image {number}", "Continuer l'image de test {number}"),
    "nothing_left": (
        "Nothing is left to fill in. Erase below, brush a hole (H), or keep only your ink.",
        "Il ne reste rien à remplir. Gommez plus bas, brossez un trou (H), ou ne gardez que votre encre.",
    ),
    "drawing": (f"The model is drawing{ELLIPSIS}", f"Le modèle dessine{ELLIPSIS}"),
    "stop": ("Stop", "Arrêter"),
    "came": ("{number} endings have come", "{number} fins sont arrivées"),
    "save": ("Save", "Enregistrer"),
    "save_one": ("One ending (PNG)", "Une fin (PNG)"),
    "save_all": ("All of them (PNG)", "Toutes (PNG)"),
    "save_drawing": ("My drawing (PNG)", "Mon dessin (PNG)"),
    "save_animation": ("How it was finished (GIF)", "Comment elle fut finie (GIF)"),
    "save_record": ("All that makes them again (JSON)", "Tout pour les refaire (JSON)"),
    "compare": ("Hold to compare", "Maintenir pour comparer"),
    "came_named": ("{number} endings have come: {names}", "{number} fins sont arrivées : {names}"),
    "named": ("Say what each ending probably is", "Dire ce que chaque fin est sans doute"),
    "named_help": (
        "The label that explains it best, under each ending and for screen readers: it takes a moment longer.",
        "L'étiquette qui l'explique le mieux, sous chaque fin et pour les lecteurs d'écran : c'est un peu plus long.",
    ),
    "tap_pixel": (
        "Dark pixels surprised the model. Tap one: how likely the model held it, given those before.",
        "Les pixels sombres ont surpris le modèle. Touchez-en un : sa probabilité, étant donnés les précédents.",
    ),
    "copy_link": ("Copy link", "Copier le lien"),
    "copied": ("Copied", "Copié"),
    # Settings.
    "dataset": ("Dataset", "Données"),
    "none_yet": ("none yet", "aucune"),
    "about_mnist": ("handwritten digits", "chiffres manuscrits"),
    "about_mnist5k": (
        "digits again, learnt in a minute or two from 4,000",
        "encore des chiffres, appris en une ou deux minutes de 4 000",
    ),
    "about_fashion_mnist": ("clothes in grey", "vêtements en gris"),
    "about_cifar10": ("small photographs", "petites photographies"),
    "finish_as": ("Finish it as", "Finir comme"),
    "draw_label": ("Draw", "Dessiner"),
    "anything": ("anything", "n'importe quoi"),
    "advanced": ("Advanced", "Avancé"),
    "temperature": ("Temperature", "Température"),
    "temperature_help": (
        "1 is the model itself; less is tamer: more endings hold together; 0: the likeliest level of each cell.",
        "1 est le modèle même ; moins est plus sage : plus de fins se tiennent ; 0 : de chaque case le niveau le plus "
        "probable.",
    ),
    "endings": ("Endings", "Fins"),
    "seed": ("Seed", "Graine"),
    "seed_placeholder": ("a new one each time", "une nouvelle chaque fois"),
    "seed_help": (
        "The number that the endings are drawn from: the same one draws the same endings again.",
        "Le nombre dont les fins sont tirées : le même redonne les mêmes fins.",
    ),
    "seed_wrong": (
        "The seed must be a whole number from 0 to {most}, got '{text}'. Empty means a new one.",
        "La graine doit être un nombre entier de 0 à {most}, pas « {text} ». Vide : une nouvelle.",
    ),
    "coloured": ("Colour what the model added", "Colorer ce que le modèle a ajouté"),
    "keys": ("Keys", "Touches"),
    # What the model must keep.
    "known": ("What the model must keep", "Ce que le modèle doit garder"),
    "known_above": ("All above", "Tout le haut"),
    "known_ink": ("Only my ink", "Mon encre seule"),
    "known_touched": ("All I touched", "Tout ce que j'ai touché"),
    "known_mask": ("Free mask", "Masque libre"),
    "known_paint": ("Only my paint", "Ma peinture seule"),
    "help_above": (
        "The model works from top to bottom: each row down to your lowest ink is kept as it is, blanks too. "
        "It fills in the hatched rows.",
        "Le modèle va de haut en bas : chaque ligne jusqu'à votre encre la plus basse est gardée, blancs compris. Il "
        "remplit les lignes hachurées.",
    ),
    "help_ink": (
        "Your ink is kept; the model may fill in any other cell. It works from top to bottom and cannot look ahead to "
        "ink further down, so these endings can be wilder.",
        "Votre encre est gardée ; le modèle peut remplir toute autre case. Il va de haut en bas sans voir l'encre plus "
        "bas : ces fins peuvent être plus folles.",
    ),
    "help_ink_seen": (
        "Your ink is kept, wherever it is: the model sees all of it, and may fill in any other cell.",
        "Votre encre est gardée, où qu'elle soit : le modèle la voit toute, et peut remplir toute autre case.",
    ),
    "help_touched": (
        "Your ink is kept, and what you brush with Blank stays empty. The model fills in the hatched cells.",
        "Votre encre est gardée, et ce que vous brossez avec Blanc reste vide. Le modèle remplit les cases hachurées.",
    ),
    "help_mask": (
        "All is kept, blanks too, but what you brush with Hole. The model fills in the holes.",
        "Tout est gardé, blancs compris, sauf ce que vous brossez avec Trou. Le modèle remplit les trous.",
    ),
    "help_paint": (
        "What you paint is kept, black too. The model fills in the hatched cells.",
        "Ce que vous peignez est gardé, le noir aussi. Le modèle remplit les cases hachurées.",
    ),
    "help_paint_above": (
        "The model works from top to bottom: each row down to your lowest paint is kept, and black where you did not "
        "paint. It fills in the hatched rows.",
        "Le modèle va de haut en bas : chaque ligne jusqu'à votre peinture la plus basse est gardée, noire où vous "
        "n'avez pas peint. Il remplit les lignes hachurées.",
    ),
    "help_paint_mask": (
        "All is kept, and black where you did not paint, but what you brush with Hole. The model fills the holes.",
        "Tout est gardé, noir où vous n'avez pas peint, sauf ce que vous brossez avec Trou. Le modèle remplit "
        "les trous.",
    ),
    # Starting from a picture.
    "picture": ("Start from a picture", "Partir d'une image"),
    "source": ("Source", "Source"),
    "source_model": ("The model makes one", "Le modèle en fait une"),
    "source_file": ("A picture of mine", "Une image à moi"),
    "picture_ways": (
        "Choose one, paste it anywhere on this page, or drop it; a phone offers its camera.",
        "Choisissez-en une, collez-la n'importe où sur cette page, ou déposez-la ; un téléphone propose son appareil "
        "photo.",
    ),
    "made_by_model": (
        "The model invents this picture: it is no real image.",
        "Le modèle invente cette image : elle n'est pas réelle.",
    ),
    "make_picture": ("Make a picture", "Faire une image"),
    "upload": ("PNG or JPEG", "PNG ou JPEG"),
    "find_ink": ("Find the ink", "Trouver l'encre"),
    "find_ink_help": (
        "Cropped, and laid as the model's images are, whatever the light and the paper.",
        "Recadrée et placée comme dans les images du modèle, quels que soient la lumière et le papier.",
    ),
    "dark_ink": ("Dark ink on light paper", "Encre sombre sur papier clair"),
    "picture_too_large": (
        "This picture is too large. Upload one of at most {most} million pixels.",
        "Cette image est trop grande. Importez-en une d'au plus {most} millions de pixels.",
    ),
    "picture_unreadable": (
        "This file is no picture that can be read. Upload a PNG or a JPEG.",
        "Ce fichier n'est pas une image lisible. Importez un PNG ou un JPEG.",
    ),
    "picture_no_ink": (
        "No ink was found in this picture. Take it nearer, on plain paper.",
        "Aucune encre trouvée dans cette image. Prenez-la de plus près, sur du papier uni.",
    ),
    "half": ("Half left to the model", "Moitié laissée au modèle"),
    "half_none": ("None", "Aucune"),
    "half_lower": ("Lower", "Bas"),
    "half_upper": ("Upper", "Haut"),
    "half_left": ("Left", "Gauche"),
    "half_right": ("Right", "Droite"),
    "as_shown": ("The picture, as the grid will show it", "L'image, telle que la grille la montrera"),
    "cells_keep": (
        "This is what {height} x {width} cells keep of it.",
        "Voilà ce que {height} x {width} cases en gardent.",
    ),
    "put": ("Put it on the grid", "La mettre sur la grille"),
    "brush_hole": (
        "Then brush a hole (H) into it, and the model fills it in.",
        "Brossez-y ensuite un trou (H), et le modèle le remplit.",
    ),
    # Generate.
    "generate_intro": (
        "Whole images, drawn from nothing, each with its exact log-probability.",
        "Des images entières, dessinées à partir de rien, chacune avec sa log-probabilité exacte.",
    ),
    "generate_button": ("Generate", "Générer"),
    "sixteen": ("Sixteen images appear here.", "Seize images apparaissent ici."),
    "likeliest_first": ("by {model}, likeliest first", "par {model}, les plus probables d'abord"),
    # Surprise.
    "surprise_intro": (
        "Each pixel costs some nats given those before it: the less likely, the more. Their sum is the image's exact "
        "log-probability.",
        "Chaque pixel coûte des nats étant donnés les précédents : moins il est probable, plus il coûte. Leur somme "
        "est la log-probabilité exacte de l'image.",
    ),
    "own_picture": ("A picture, instead of your drawing", "Une image, à la place de votre dessin"),
    "told": ("Told that it is", "En lui disant que c'est"),
    "as_sent": ("as it is sent", "telle qu'envoyée"),
    "sent": ("The image, as it is sent", "L'image, telle qu'envoyée"),
    "heat_map": ("Heat map of nats per pixel", "Carte des nats par pixel"),
    "example_scored": (
        "Nothing is drawn yet: this is a real test image. Draw on the first page, or upload.",
        "Rien n'est encore dessiné : voici une vraie image de test. Dessinez sur la première page, ou importez.",
    ),
    "nothing_scored": (
        "Nothing is drawn yet: this is what an empty page costs. Draw on the first page, or upload.",
        "Rien n'est encore dessiné : voilà ce que coûte une page vide. Dessinez sur la première page, ou importez.",
    ),
    "log_probability": ("log-probability", "log-probabilité"),
    "per_dimension": ("per dimension", "par dimension"),
    "usual": ("a usual test image", "une image de test ordinaire"),
    "packed": (
        "Packed by the model, without loss: {packed} bytes; as a PNG: {png} (docs/packing.md).",
        "Compressée par le modèle, sans perte : {packed} octets ; en PNG : {png} (docs/packing.md).",
    ),
    "which_label": ("Which label explains it best?", "Quelle étiquette l'explique le mieux ?"),
    "asking": (f"Asking of each label{ELLIPSIS}", f"On demande pour chaque étiquette{ELLIPSIS}"),
    # Models.
    "models_intro": (
        "One champion per dataset. A better version takes its place without a restart.",
        "Un champion par jeu de données. Une meilleure version le remplace sans redémarrage.",
    ),
    "model_facts": (
        "{architecture} · {height} x {width}{colour}, {levels} levels · protocol: {protocol}",
        "{architecture} · {height} x {width}{colour}, {levels} niveaux · protocole : {protocol}",
    ),
    "test_nll": ("test NLL ({protocol})", "NLL de test ({protocol})"),
    "line_nll": (
        "test NLL {nll} (protocol: {protocol}{images})",
        "NLL de test {nll} (protocole : {protocol}{images})",
    ),
    "line_images": (", {number} test images", ", {number} images de test"),
    "nats_per_image": ("nats per image", "nats par image"),
    "promoted": ("promoted", "promu"),
    "data_hash": ("data hash", "empreinte des données"),
    "git_commit": ("git commit", "commit git"),
    "run_id": ("MLflow run", "run MLflow"),
    "weights_sha256": ("weights sha256", "sha256 des poids"),
    "beside": ("Beside it: {papers}", "À côté : {papers}"),
    # Test figures of the papers, to stand beside ours. The protocol belongs to each.
    "papers_mnist": (
        "PixelRNN paper (arXiv:1601.06759): PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 nats; protocol "
        "static, so not the same task as dynamic.",
        "article PixelRNN (arXiv:1601.06759) : PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 nats ; protocole "
        "static, donc une autre tâche que dynamic.",
    ),
    "papers_mnist5k": (
        "No paper uses these 5,000 digits. The PixelRNN paper's PixelCNN learned from all of MNIST and has 81.30 nats; "
        "protocol static.",
        "aucun article n'utilise ces 5 000 chiffres. Le PixelCNN de l'article PixelRNN a appris de tout MNIST et a "
        "81.30 nats ; protocole static.",
    ),
    "papers_fashion_mnist": (
        "No autoregressive figure is published. Glow has 2.958 bits/dim (approximate); protocol 8-bit.",
        "aucune valeur autorégressive n'est publiée. Glow a 2.958 bits/dim (valeur approximative) ; protocole 8-bit.",
    ),
    "papers_cifar10": (
        "PixelCNN 3.14, PixelRNN 3.00 (arXiv:1601.06759), Gated PixelCNN 3.03 (arXiv:1606.05328) bits/dim; "
        "protocol 8-bit.",
        "PixelCNN 3.14, PixelRNN 3.00 (arXiv:1601.06759), Gated PixelCNN 3.03 (arXiv:1606.05328) bits/dim ; "
        "protocole 8-bit.",
    ),
    "all_scores": ("All scores", "Tous les scores"),
    # What the images of the datasets are of, as the service names it.
    "label T-shirt/top": ("T-shirt/top", "t-shirt/haut"),
    "label Trouser": ("Trouser", "pantalon"),
    "label Pullover": ("Pullover", "pull"),
    "label Dress": ("Dress", "robe"),
    "label Coat": ("Coat", "manteau"),
    "label Sandal": ("Sandal", "sandale"),
    "label Shirt": ("Shirt", "chemise"),
    "label Sneaker": ("Sneaker", "basket"),
    "label Bag": ("Bag", "sac"),
    "label Ankle boot": ("Ankle boot", "bottine"),
    "label airplane": ("airplane", "avion"),
    "label automobile": ("automobile", "voiture"),
    "label bird": ("bird", "oiseau"),
    "label cat": ("cat", "chat"),
    "label deer": ("deer", "cerf"),
    "label dog": ("dog", "chien"),
    "label frog": ("frog", "grenouille"),
    "label horse": ("horse", "cheval"),
    "label ship": ("ship", "bateau"),
    "label truck": ("truck", "camion"),
    # When the service does not answer.
    "away": (
        "The model does not answer just now. Your drawing is kept.",
        "Le modèle ne répond pas pour l'instant. Votre dessin est conservé.",
    ),
    "busy": (
        "Many are drawing just now: your turn comes in a moment. Your drawing is kept.",
        "Beaucoup dessinent en ce moment : votre tour vient dans un instant. Votre dessin est conservé.",
    ),
    "refused": (
        "The model cannot take this as it is. Your drawing is kept.",
        "Le modèle ne peut pas prendre ceci tel quel. Votre dessin est conservé.",
    ),
    "no_model": (
        "There is no model yet. Your drawing is kept.",
        "Il n'y a pas encore de modèle. Votre dessin est conservé.",
    ),
    "again_in": ("Trying again in {seconds} s", "Nouvel essai dans {seconds} s"),
    "try_now": ("Try again now", "Réessayer maintenant"),
    "operator": ("For whoever runs this page", "Pour qui fait tourner cette page"),
    "operator_no_model": (
        "No model is promoted yet. Run `make pipeline`.",
        "Aucun modèle n'est encore promu. Lancez `make pipeline`.",
    ),
}

TEXTS["keys_table"] = (
    """
| key | does |
| --- | --- |
| `P` `E` `B` `H` | pen, eraser, known blank, hole |
| `1` `2` `3` `5` `8` | brush width in cells |
| `S` | soft edge of the pen, on or off |
| `Ctrl+Z`, `Ctrl+Shift+Z` | undo, redo |
| `Delete` | clear; undo brings it back |
| arrows, `Space` | on the grid: go to a cell, draw there; with `Shift`, draw on the way |
| `F` | complete |
| `Tab`, `Enter` | reach an ending, continue from it |
""",
    """
| touche | effet |
| --- | --- |
| `P` `E` `B` `H` | crayon, gomme, blanc connu, trou |
| `1` `2` `3` `5` `8` | largeur du pinceau en cases |
| `S` | bord doux du crayon, oui ou non |
| `Ctrl+Z`, `Ctrl+Maj+Z` | annuler, rétablir |
| `Suppr` | effacer ; annuler le ramène |
| flèches, `Espace` | sur la grille : aller à une case, y dessiner ; avec `Maj`, dessiner en chemin |
| `F` | compléter |
| `Tab`, `Entrée` | atteindre une fin, continuer à partir d'elle |
""",
)

SPOKEN: ContextVar[str] = ContextVar("spoken")  # where no page runs, which knows its browser


def language() -> str:
    """Return the language to show: the browser's if the canvas speaks it, else English."""
    if spoken := SPOKEN.get(""):
        return spoken
    found = (st.context.locale or "")[:2].lower()
    return found if found in LANGUAGES else LANGUAGES[0]


def say(key: str, **values: object) -> str:
    """Return a text in the language to show, with values in its {places}."""
    return TEXTS[key][LANGUAGES.index(language())].format(**values)


def say_label(name: str) -> str:
    """Return a label as the service names it in the language to show, where the canvas knows it."""
    return say(f"label {name}") if f"label {name}" in TEXTS else name
